"""Calls are judged once for each kind: whatever could change the verdict makes a new kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fxport.ops import plans
from fxport.ops.params import AttentionParams

pytestmark = pytest.mark.usefixtures("nothing_judged")

CAUSAL = AttentionParams(0.5, causal=True)
Tensors = list[Tensor | None]


def _tensors(length: int = 6, dtype: torch.dtype = torch.float32) -> Tensors:
    qkv: Tensors = [torch.randn(1, 2, length, 8, dtype=dtype) for _ in range(3)]
    return [*qkv, None, None, None, None, None]


def _with(place: int, value: Tensor) -> Tensors:
    tensors = _tensors()
    tensors[place] = value
    return tensors


def _call(tensors: Tensors, params: AttentionParams = CAUSAL) -> Any:
    return torch.ops.fxport.attention(*tensors, *astuple(params))


def _judged() -> int:
    return plans._judge.cache_info().misses


def test_equal_calls_are_judged_once() -> None:
    for _ in range(3):
        _call(_tensors())
    assert _judged() == 1


OTHERS: dict[str, Callable[[], Any]] = {
    "length": lambda: _call(_tensors(7)),
    "dtype": lambda: _call(_tensors(dtype=torch.float64)),
    "keys": lambda: _call([_tensors()[0], *_tensors(9)[1:3], *_tensors()[3:]]),
    "bias": lambda: _call(_with(3, torch.randn(6, 6))),
    "bool bias": lambda: _call(_with(3, torch.ones(6, 6, dtype=torch.bool))),
    "bias per key": lambda: _call(_with(3, torch.ones(6, dtype=torch.bool))),
    "sinks": lambda: _call(_with(4, torch.randn(2))),
    "slopes": lambda: _call(_with(5, torch.randn(2))),
    "packed": lambda: _call(_with(6, torch.tensor([0, 2, 6], dtype=torch.int32))),
    "segments": lambda: _call(_with(6, torch.tensor([0, 2, 3, 6], dtype=torch.int32))),
    "seed": lambda: _call(_with(7, torch.tensor([1]))),
    "all keys": lambda: _call(_tensors(), AttentionParams(0.5)),
    "scale": lambda: _call(_tensors(), replace(CAUSAL, scale=0.25)),
    "window": lambda: _call(_tensors(), replace(CAUSAL, window_left=2)),
    "softcap": lambda: _call(_tensors(), replace(CAUSAL, softcap=2.0)),
    "offset": lambda: _call(_tensors(), replace(CAUSAL, q_offset=1)),
    "a gradient": lambda: plans.plan(_tensors(), astuple(CAUSAL), (True,) * 3 + (False,) * 3),
    "k's gradient": lambda: plans.plan(_tensors(), astuple(CAUSAL), (False, True, *[False] * 4)),
    "lse's gradient": lambda: plans.plan(
        _tensors(), astuple(CAUSAL), (True,) * 3 + (False,) * 3, lse_gradient=True
    ),
}


def test_other_calls_are_judged_anew() -> None:
    _call(_tensors())
    for count, (name, other) in enumerate(OTHERS.items(), start=2):
        other()
        assert _judged() == count, name


@pytest.mark.parametrize("switch", ["deterministic", "cudnn", "flash"])
def test_settings_are_part_of_the_kind(switch: str) -> None:
    """Those that the implementations for CUDA ask for."""
    _call(_tensors())
    deterministic = torch.are_deterministic_algorithms_enabled()
    cudnn, flash = torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.cuda.flash_sdp_enabled()
    try:
        if switch == "deterministic":
            torch.use_deterministic_algorithms(not deterministic)
        elif switch == "cudnn":
            torch.backends.cuda.enable_cudnn_sdp(not cudnn)
        else:
            torch.backends.cuda.enable_flash_sdp(not flash)
        _call(_tensors())
    finally:
        torch.use_deterministic_algorithms(deterministic)
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        torch.backends.cuda.enable_flash_sdp(flash)
    assert _judged() == 2


def test_wrong_calls_are_refused_every_time() -> None:
    _call(_tensors())
    wrong = _with(4, torch.randn(3))
    for _ in range(2):
        with pytest.raises(ValueError, match="sinks has 3 of 2 heads"):
            _call(wrong)
    falling = _with(6, torch.tensor([0, 2, 6], dtype=torch.int32))
    _call(falling)
    falling[6] = torch.tensor([0, 7, 6], dtype=torch.int32)  # of the same kind: only values differ
    with pytest.raises(ValueError, match="cu_seqlens must rise"):
        _call(falling)


def test_dynamo_does_not_look_into_the_kernels() -> None:
    """Called by code that Dynamo skipped, but whose calls it still looks into."""
    compiled: list[Any] = []

    def backend(gm: torch.fx.GraphModule, _: Any) -> Any:
        compiled.append(gm)
        return gm.forward

    tensors = [x.requires_grad_() if x is not None else None for x in _tensors()]

    @torch._dynamo.disable(recursive=False)
    def skipped(x: Tensor) -> Tensor:
        out, _ = torch.ops.fxport.attention.default(x, *tensors[1:], *astuple(CAUSAL))
        return out.detach()

    assert tensors[0] is not None
    torch._dynamo.reset()
    torch.compile(lambda x: skipped(x), backend=backend)(tensors[0])
    assert not compiled
