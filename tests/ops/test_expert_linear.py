"""`fxport::expert_linear` against a product with a copied weight for every row."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fxport.ops.experts import _by_copies, expert_linear

EXPERTS, OUT, IN = 5, 7, 11


def case(*rows: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(len(rows))
    x = torch.randn(*rows, IN, generator=generator, dtype=dtype)
    weight = torch.randn(EXPERTS, OUT, IN, generator=generator, dtype=dtype)
    experts = torch.randint(0, EXPERTS - 1, rows, generator=generator)  # the last has no row
    return x, weight, experts


def copied(x: Tensor, weight: Tensor, experts: Tensor) -> Tensor:
    return torch.einsum("...oi,...i->...o", weight[experts], x)


@pytest.mark.parametrize("rows", [(), (1,), (13,), (2, 3), (2, 3, 4), (0,)], ids=str)
def test_output_and_gradients(rows: tuple[int, ...]) -> None:
    x, weight, experts = case(*rows)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    found, expected = expert_linear(x, weight, experts), copied(x, weight, experts)
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-13)
    up = torch.randn_like(expected)
    pairs = zip(
        torch.autograd.grad(found, (x, weight), up),
        torch.autograd.grad(expected, (x, weight), up),
        strict=True,
    )
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=0.0, atol=1e-12)


def test_a_weight_stored_the_other_way_round() -> None:
    x, weight, experts = case(13)
    turned = weight.transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(expert_linear(x, turned, experts), copied(x, weight, experts))


def test_opcheck() -> None:
    x, weight, experts = case(2, 3)
    op = torch.ops.fxport.expert_linear.default
    torch.library.opcheck(op, (x.requires_grad_(), weight.requires_grad_(), experts))
    outer = torch.ops.fxport.expert_outer.default
    torch.library.opcheck(outer, (torch.randn(2, 3, OUT).double(), x.detach(), experts, EXPERTS))


def test_under_autocast_as_bmm() -> None:
    x, weight, experts = case(13, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = expert_linear(x, weight, experts)
    assert found.dtype == torch.bfloat16
    half = copied(x.bfloat16(), weight.bfloat16(), experts)
    torch.testing.assert_close(found, half, rtol=2e-2, atol=2e-2)


def test_no_weight_is_copied_for_a_row() -> None:
    sizes: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = func(*args, **kwargs or {})
            sizes.extend([result.numel()] if isinstance(result, Tensor) else [])
            return result

    x, weight, experts = case(200)
    with Watch():
        expert_linear(x, weight, experts)
    assert max(sizes) <= max(200 * IN, weight.numel())  # a copy for each row is 200 * OUT * IN


def test_copies_of_some_rows_at_a_time() -> None:
    """What CUDA runs in float64 while a graph is captured; `test_triton_experts` has the others."""
    x, weight, experts = case(150)
    torch.testing.assert_close(_by_copies(x, weight, experts), copied(x, weight, experts))


@pytest.mark.parametrize("wrong", [-1, EXPERTS])
def test_an_expert_that_does_not_exist(wrong: int) -> None:
    x, weight, experts = case(4)
    experts[2] = wrong
    with pytest.raises(IndexError, match="not one of 0 to 4"):
        expert_linear(x, weight, experts)


def test_what_does_not_fit() -> None:
    x, weight, experts = case(4)
    with pytest.raises(ValueError, match="one for each row"):
        expert_linear(x, weight, experts[:3])
    with pytest.raises(ValueError, match="one dtype"):
        expert_linear(x.float(), weight, experts)
    with pytest.raises(ValueError, match=r"\[..., I\]"):
        expert_linear(x[:, :4], weight, experts)
    with pytest.raises(ValueError, match="integers"):
        expert_linear(x, weight, experts == 1)
