"""Tests of the Triton kernels of `expert_linear`; `test_triton_experts.py` decides where they run.

Every case is compared with a product for each row in float64.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxport.ops.experts import _different_rows
from fxport.ops.triton.experts import outer, product

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOUNDS = {torch.float32: 2e-6, torch.float16: 1e-3}
if DEVICE == "cuda":  # the interpreter's tl.dot multiplies the bit patterns of bfloat16
    BOUNDS[torch.bfloat16] = 8e-3
# rows, experts, out, in: odd sizes, one row, many experts with few rows, few with many, no rows
SHAPES = [(1, 1, 16, 16), (37, 5, 70, 33), (9, 20, 24, 130), (150, 2, 65, 40), (0, 3, 8, 8)]


def _case(
    rows: int, experts: int, height: int, width: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, width, generator=generator).to(DEVICE, dtype)
    weight = torch.randn(experts, height, width, generator=generator).to(DEVICE, dtype)
    chosen = torch.randint(0, max(experts - 1, 1), (rows,), generator=generator)
    return x, weight, chosen.to(DEVICE)  # the last expert has no row


def _assert_close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype
    assert found.shape == expected.shape
    error = (found.double() - expected).norm()
    assert error <= BOUNDS[dtype] * expected.norm(), error / expected.norm()


def _product64(x: Tensor, weight: Tensor, chosen: Tensor) -> Tensor:
    return torch.einsum("si,soi->so", x.double(), weight.double()[chosen.long()])


@pytest.mark.parametrize("dtype", list(BOUNDS), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_product(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight, chosen = _case(*shape, dtype)
    _assert_close(product(x, weight, chosen), _product64(x, weight, chosen), dtype)


@pytest.mark.parametrize("dtype", list(BOUNDS), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradient_of_the_weights(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight, chosen = _case(*shape, dtype)
    grad = torch.randn(len(x), shape[2], generator=torch.Generator().manual_seed(1))
    grad = grad.to(DEVICE, dtype)
    expected = torch.zeros(weight.shape, dtype=torch.float64, device=DEVICE)
    pairs = torch.einsum("so,si->soi", grad.double(), x.double())
    expected.index_add_(0, chosen, pairs)
    _assert_close(outer(grad, x, chosen, len(weight)), expected, dtype)


def test_other_layouts() -> None:
    """The gradient of x is a product with turned weights; rows may be a slice or expanded."""
    x, weight, chosen = _case(37, 5, 70, 33, torch.float32)
    grad = torch.randn(37, 140, generator=torch.Generator().manual_seed(1)).to(DEVICE)[:, ::2]
    turned = weight.transpose(1, 2)
    _assert_close(product(grad, turned, chosen), _product64(grad, turned, chosen), x.dtype)
    same = x[:1].expand(37, -1)
    found = product(same, weight, chosen.int())
    _assert_close(found, _product64(same, weight, chosen), x.dtype)


def test_several_experts_for_each_row() -> None:
    """Rows that are the same for all experts of a token are read, not copied."""
    x, weight, _ = _case(13, 5, 70, 33, torch.float32)
    chosen = torch.randint(0, 5, (13, 3), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    spread = x.unsqueeze(1).expand(-1, 3, -1)
    rows = _different_rows(spread)
    assert rows.data_ptr() == x.data_ptr()
    assert rows.shape == x.shape
    expected = _product64(spread.reshape(39, 33), weight, chosen.flatten())
    _assert_close(product(rows, weight, chosen.flatten()), expected, x.dtype)
    assert _different_rows(spread.contiguous()).shape == (39, 33)
    assert _different_rows(spread.transpose(0, 1)).shape == (39, 33)


def test_more_rows_than_are_ordered_at_a_time() -> None:
    x, weight, chosen = _case(8300, 3, 16, 16, torch.float32)
    _assert_close(product(x, weight, chosen), _product64(x, weight, chosen), x.dtype)


@pytest.mark.parametrize("wrong", [-1, 5])
def test_an_expert_that_does_not_exist(wrong: int) -> None:
    """Its row is NaN, the others are right; it has no part in any gradient."""
    x, weight, chosen = _case(37, 5, 70, 33, torch.float32)
    expected = _product64(x, weight, chosen)
    asked = chosen.clone()
    asked[7] = wrong
    found = product(x, weight, asked)
    assert found[7].isnan().all()
    others = torch.arange(37, device=DEVICE) != 7
    _assert_close(found[others], expected[others], x.dtype)
    gradient = outer(found.nan_to_num(), x, asked, 5)
    without = outer(found[others], x[others], asked[others], 5)
    torch.testing.assert_close(gradient, without, rtol=1e-5, atol=1e-4)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("dtype", list(BOUNDS), ids=str)
def test_graph_serves_other_choices(dtype: torch.dtype) -> None:
    """The op, forward and backward, captured once: replayed with rows of other experts."""
    from fxport.ops.experts import expert_linear

    x, weight, chosen = _case(300, 7, 64, 48, dtype)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    up = torch.randn(300, 64, device=DEVICE).to(dtype)

    def step() -> tuple[Tensor, ...]:
        y = expert_linear(x, weight, chosen)
        return y, *torch.autograd.grad(y, (x, weight), up)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            found = step()
    for seed in (1, 2):
        drawn = torch.randint(0, 7, (300,), generator=torch.Generator().manual_seed(seed))
        chosen.copy_(drawn)
        graph.replay()
        x64, w64 = (t.detach().double().requires_grad_() for t in (x, weight))
        y = _product64(x64, w64, chosen)
        expected = (y, *torch.autograd.grad(y, (x64, w64), up.double()))
        for one, other in zip(found, expected, strict=True):
            _assert_close(one, other.detach(), dtype)
