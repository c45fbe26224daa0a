"""Every implementation on a GPU can be recorded as a CUDA graph, and the graph serves other values.

So a training step under ``mode="reduce-overhead"`` works with any dtype and mask.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fxport.ops import attention, dispatch
from fxport.ops.params import AttentionParams

PLAIN = AttentionParams(scale=0.25, causal=True)
WINDOW = AttentionParams(scale=0.25, causal=True, window_left=20)
CASES = {
    "blocked": (torch.float64, PLAIN, False),
    "blocked, with a bias": (torch.float64, WINDOW, True),
    "triton": (torch.bfloat16, replace(WINDOW, softcap=30.0), False),
    "triton, with a bias": (torch.float32, PLAIN, True),
    "libraries": (torch.bfloat16, PLAIN, False),
    "libraries, with a window": (torch.bfloat16, WINDOW, False),
}


def _training_call(inputs: list[Tensor], grad: Tensor, params: AttentionParams) -> list[Tensor]:
    q, k, v, *others = [x.detach().requires_grad_() for x in inputs]
    out, _lse = attention(q, k, v, bias=others[0] if others else None, params=params)
    return [out.detach(), *torch.autograd.grad(out, [q, k, v, *others], grad)]


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_a_graph_serves_other_values(case: str) -> None:
    """Also scores so large that lse alone does not say what the weights are."""
    dtype, params, has_bias = CASES[case]
    options = {"generator": torch.Generator("cuda").manual_seed(7), "device": "cuda"}
    shapes = [(2, 3, 130, 64)] * 3 + [(1, 3, 130, 130)] * has_bias
    inputs = [torch.randn(s, **options).to(dtype) for s in shapes]
    grad = torch.randn((2, 3, 130, 64), **options).to(dtype)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        _training_call(inputs, grad, params)  # whatever is prepared once
        graph = torch.cuda.CUDAGraph()
        before = dispatch.calls.copy()
        with torch.cuda.graph(graph, stream=stream):
            got = _training_call(inputs, grad, params)
    ran = {name.split(".")[0] for name in dispatch.calls - before}
    assert ran == {case.split(",")[0]} or (case.startswith("libraries") and ran)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-2
    for values in ("as recorded", "others", "large"):
        if values != "as recorded":
            for x in inputs[:3]:
                x.copy_(torch.randn(x.shape, **options))
        if values == "large" and has_bias:
            inputs[3].fill_(torch.finfo(torch.float32).min)
        graph.replay()
        torch.cuda.synchronize()
        for found, wanted in zip(got, _training_call(inputs, grad, params), strict=True):
            difference = (found.double() - wanted.double()).norm()
            assert difference <= tolerance * wanted.double().norm(), values
