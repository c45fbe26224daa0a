"""The numbers of selected rows as a list: an index, and nothing else.

    rows, slot = torch.where(chosen == i)
    x[None, rows.tolist()]                   x[None, rows]
    if not rows.tolist(): continue           asked before, when the rows were looked for

Whoever counts or reads them is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fxport.capture.location import asks_for_zero
from fxport.capture.run_lengths import NumbersTaken

__all__ = ["RowNumbers", "lists_of_rows", "with_rows"]


@contextmanager
def lists_of_rows(selected: Callable[[Tensor], bool]) -> Iterator[None]:
    """While active, the list of selected rows is a `RowNumbers`.

    No torch function mode is asked: these tensors make lists in Python.
    """
    own = FakeTensor.tolist

    def tolist(tensor: Tensor) -> Any:
        whole = tensor.dim() == 1 and tensor.dtype in (torch.int64, torch.int32)
        return RowNumbers(tensor) if whole and selected(tensor) else own(tensor)  # type: ignore[arg-type]

    FakeTensor.tolist = tolist  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        FakeTensor.tolist = own  # type: ignore[method-assign]


class RowNumbers:
    """In place of the list that a tensor of at least one row number gives.

    Args:
        rows: an index that is written to is refused, so the list may be this very tensor.
    """

    __slots__ = ("rows",)

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def __bool__(self) -> bool:
        return True

    def __len__(self) -> int:
        if asks_for_zero():
            return 1
        raise NumbersTaken

    def _taken(self, *_: Any) -> Any:
        raise NumbersTaken

    __iter__ = __getitem__ = __contains__ = __reversed__ = __add__ = __radd__ = _taken
    __mul__ = __rmul__ = __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _taken  # type: ignore[assignment]
    __hash__ = __repr__ = _taken  # type: ignore[assignment]


def with_rows(index: Any) -> Any:
    """An index with tensors in place of such lists."""
    if isinstance(index, tuple):
        return tuple(i.rows if isinstance(i, RowNumbers) else i for i in index)
    return index.rows if isinstance(index, RowNumbers) else index
