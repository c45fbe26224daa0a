"""What autocast does to an operation, found by watching it.

    under autocast                  linear(x f32, w f32)      to(x), to(w), t(..), addmm(..)
    without, on operands cast first linear(x bf16, w bf16)    to(x), to(w), t(..), addmm(..)

The same operations on the same values, in the same order but for the casts: so autocast makes
``linear(to(x, bf16), to(w, bf16))`` of ``linear(x, w)``. No list says what it does to what.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Autocast", "UnknownUnderAutocast", "operand_dtype"]


class UnknownUnderAutocast(Exception):
    """Autocast does something else to this operation than cast its operands to one dtype."""


@dataclass(frozen=True)
class Autocast:
    """A region of autocast that is switched on."""

    device: str
    dtype: torch.dtype

    def casts(self, value: Any) -> bool:
        """Whether it may cast a value."""
        return (
            isinstance(value, torch.Tensor)
            and value.is_floating_point()
            and value.dtype != torch.float64
            and value.device.type == self.device
        )


def operand_dtype(node: fx.Node, region: Autocast) -> torch.dtype | None:
    """The dtype to which autocast casts every operand that it may cast; None: it casts none.

    Args:
        node: an operation on nodes that have their fake values.

    Raises:
        UnknownUnderAutocast: neither is what was seen.
    """
    operands = [n.meta["val"] for n in node.all_input_nodes if region.casts(n.meta.get("val"))]
    if not operands:
        return None
    with torch.autocast(region.device, region.dtype, cache_enabled=False):
        seen = _recorded(node, lambda value: value)
    for dtype in dict.fromkeys((None, region.dtype, torch.float32, _widest(operands))):
        try:
            found = _recorded(node, _cast_to(dtype, region))
        except RuntimeError:  # autocast takes dtypes together that the operation does not
            continue
        if seen == found:
            return dtype
    raise UnknownUnderAutocast(str(node.target))


def _cast_to(dtype: torch.dtype | None, region: Autocast) -> Callable[[Any], Any]:
    def cast(value: Any) -> Any:
        return value.to(dtype) if dtype and region.casts(value) else value

    return cast


def _widest(operands: list[torch.Tensor]) -> torch.dtype:
    found = operands[0].dtype
    for operand in operands[1:]:
        found = torch.promote_types(found, operand.dtype)
    return found


def _recorded(node: fx.Node, cast: Callable[[Any], Any]) -> list[Any]:
    """What comes out, as what is called below autocast makes it of the operands."""
    operands = [n.meta["val"] for n in node.all_input_nodes if "val" in n.meta]
    recorder = _Recorder([v for v in operands if isinstance(v, torch.Tensor)])
    target: Callable[..., Any] = node.target  # type: ignore[assignment]
    given = (node.args, dict(node.kwargs))
    fake = (v.fake_mode for v in operands if isinstance(v, FakeTensor))
    with torch.no_grad(), next(fake, nullcontext()), recorder:
        args, kwargs = fx.node.map_arg(given, lambda n: cast(n.meta["val"]))
        result = target(*args, **kwargs)
    return [*recorder.writes, *recorder.described(result)]


_MOVING = {torch.ops.aten.clone.default, torch.ops.aten._unsafe_view.default}


class _Recorder(TorchDispatchMode):
    """Names tensors by how they are made of the operands.

    A cast is named where the operand is: ``to(t(w))`` and ``t(to(w))`` are the same numbers.
    """

    def __init__(self, operands: list[torch.Tensor]) -> None:
        super().__init__()
        self.writes: list[Any] = []
        self._kept = list(operands)  # or another tensor could get the id of one let go
        self._names: dict[int, Any] = {id(v): ("operand", i) for i, v in enumerate(operands)}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        given = self.described(args), self.described(kwargs)
        result = func(*args, **kwargs)
        if func is torch.ops.aten._to_copy.default and set(kwargs) == {"dtype"}:
            self._name(result, _cast(self._names[id(args[0])], kwargs["dtype"]))
        elif _moves(func, args, result):
            self._name(result, ("moved", str(func), self.described(args[1:]), given[1],
                                self._names[id(args[0])]))  # fmt: skip
        else:
            if func._schema.is_mutable:
                self.writes.append((str(func), given))
            for index, value in enumerate(tree_leaves(result)):
                if isinstance(value, torch.Tensor):
                    self._name(value, ("made", str(func), given, index, value.dtype))
        return result

    def _name(self, value: torch.Tensor, name: Any) -> Any:
        self._kept.append(value)
        return self._names.setdefault(id(value), name)

    def described(self, value: Any) -> list[Any]:
        return [
            self._name(leaf, ("unknown", len(self._kept)))
            if isinstance(leaf, torch.Tensor)
            else (type(leaf).__name__, str(leaf))
            for leaf in tree_leaves(value)
        ]


def _cast(name: Any, dtype: torch.dtype) -> Any:
    if name[0] == "moved":
        return (*name[:-1], _cast(name[-1], dtype))
    return "cast", name, dtype


def _moves(func: Any, args: tuple[Any, ...], result: Any) -> bool:
    """Whether the first argument's numbers come out, in another order or place at most."""
    if not args or not isinstance(result, torch.Tensor) or not isinstance(args[0], torch.Tensor):
        return False
    alias = func._schema.returns[0].alias_info
    view = alias is not None and not alias.is_write
    return (view or func in _MOVING) and result.dtype == args[0].dtype
