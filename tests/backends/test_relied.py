"""The watch on buffers that a proof read: other values are refused, the same values are not."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from fxport.backends.relied import watch_buffers
from fxport.capture.inputs import GraphInput, InputKind
from fxport.errors import FxportError

SIZE = 9


def graph_with(masks: dict[str, Tensor]) -> fx.GraphModule:
    """``forward(x, *masks)`` with the masks as buffers."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["input"] = GraphInput(InputKind.DATA, "x", None)
    for name, value in masks.items():
        node = graph.placeholder(name.replace(".", "_"))
        node.meta["input"] = GraphInput(InputKind.BUFFER, name, value)
    graph.output(x)
    return fx.GraphModule({}, graph)


def causal() -> Tensor:
    return torch.ones(SIZE, SIZE).tril()


def watched(masks: dict[str, Tensor], *names: str) -> Callable[..., Any]:
    return watch_buffers(lambda x, *_: x, graph_with(masks), names)


def written(mask: Tensor) -> Tensor:
    mask[5, 3] = 0
    return mask


def replaced(mask: Tensor) -> Tensor:
    return written(mask.clone())


def grown(mask: Tensor) -> Tensor:
    return torch.ones(SIZE + 1, SIZE + 1).tril()


def converted(mask: Tensor) -> Tensor:
    return mask.bool()


def made_nan(mask: Tensor) -> Tensor:
    mask[0, 0] = float("nan")
    return mask


def swapped(mask: Tensor) -> Tensor:
    """Other memory under the same tensor."""
    mask.set_(written(causal()).untyped_storage())
    return mask.view(SIZE, SIZE)


@pytest.mark.parametrize("change", [written, replaced, grown, converted, made_nan, swapped])
def test_other_values_are_refused(change: Callable[[Tensor], Tensor]) -> None:
    first, second = causal(), causal()
    call = watched({"a.mask": first, "b.mask": second}, "a.mask", "b.mask")
    x = torch.ones(2)
    assert call(x, first, second) is x
    second = change(second)
    for _ in range(2):  # not only the first time
        with pytest.raises(FxportError, match=r"'b\.mask' has changed"):
            call(x, first, second)


def test_written_back_is_fine_again() -> None:
    mask = causal()
    call = watched({"mask": mask}, "mask")
    written(mask)
    with pytest.raises(FxportError):
        call(torch.ones(2), mask)
    mask[5, 3] = 1
    call(torch.ones(2), mask)
    mask[5, 3] = 0
    with pytest.raises(FxportError):
        call(torch.ones(2), mask)


def test_the_same_values_are_fine() -> None:
    mask = causal()
    call = watched({"mask": mask}, "mask")
    mask.copy_(causal())
    call(torch.ones(2), mask)
    call(torch.ones(2), causal())


def test_inference_tensors_are_compared_every_time() -> None:
    """They count no versions."""
    with torch.inference_mode():
        mask = causal()
        call = watched({"mask": mask}, "mask")
        call(torch.ones(2), mask)
        mask[5, 3] = 0
        with pytest.raises(FxportError):
            call(torch.ones(2), mask)


def test_only_what_a_proof_read_is_watched() -> None:
    relied, other = causal(), causal()
    call = watched({"relied": relied, "other": other}, "relied")
    written(other)
    call(torch.ones(2), relied, other)


def test_no_copy_is_held() -> None:
    """Masks are T * T: a copy would be a good part of what a compiled step holds."""

    def held() -> int:
        gc.collect()
        shape = (SIZE, SIZE)
        return sum(type(x) is Tensor and x.shape == shape for x in gc.get_objects())

    mask = causal()
    before = held()
    call = watched({"a.mask": mask}, "a.mask")
    assert held() == before
    call(torch.ones(2), mask)
