"""The op `fxport::expert_linear`: every row times the weight of its own expert.

    y[s] = weight[experts[s]] @ x[s]

Rows are sorted by expert, so that each expert that has rows is one matrix product and no weight is
copied. ``torch.bmm(weight[experts], x[..., None])`` copies one weight for every row.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fxport.ops.opaque import Below, autocast, differentiate, opaque_op

__all__ = ["expert_linear"]

# Where the device must not be waited for: rows whose weights are copied at a time.
_ROWS = 64


def expert_linear(x: Tensor, weight: Tensor, experts: Tensor) -> Tensor:
    """Every row times the weight of its own expert.

    Args:
        x: ``[..., I]``, floating.
        weight: ``[E, O, I]``, same dtype; any strides.
        experts: ``[...]``, integers from 0 to E - 1. Values are checked on CPU only.

    Returns:
        ``[..., O]``, contiguous; differentiable once in `x` and `weight`.

    Raises:
        ValueError: shapes or dtypes do not fit.
        IndexError: on CPU, an expert that does not exist.

    On CUDA, 16-bit types and float32 run as one grouped product, forward and backward, and rows of
    experts that do not exist are NaN. float64 runs one product for each expert and waits for the
    device once; while a CUDA graph is captured, it copies the weights of 64 rows at a time.
    """
    found: Tensor = torch.ops.fxport.expert_linear(x, weight, experts)
    return found


def _check(x: Tensor, weight: Tensor, experts: Tensor) -> None:
    if weight.dim() != 3 or x.dim() < 1 or x.shape[-1] != weight.shape[2]:
        raise ValueError(
            f"x must be [..., I] and weight [E, O, I], not {_of(x.shape)} and {_of(weight.shape)}"
        )
    if experts.shape != x.shape[:-1] or experts.is_floating_point() or experts.dtype == torch.bool:
        raise ValueError(
            f"experts must be integers, one for each row {_of(x.shape[:-1])}, "
            f"not {experts.dtype} {_of(experts.shape)}"
        )
    if x.dtype != weight.dtype:
        raise ValueError(f"x and weight must have one dtype, not {x.dtype} and {weight.dtype}")


def _of(shape: torch.Size) -> str:
    return str(list(shape))


# -- forward -----------------------------------------------------------------------------------


@opaque_op("fxport::expert_linear", "(Tensor x, Tensor weight, Tensor experts) -> Tensor")
def _expert_linear(x: Tensor, weight: Tensor, experts: Tensor) -> Tensor:
    _check(x, weight, experts)
    chosen = experts.reshape(-1)
    if (kernels := _kernels(x)) is not None:
        by_kernel: Tensor = kernels.product(_different_rows(x), weight, chosen)
        return by_kernel.view(*x.shape[:-1], weight.shape[1])
    rows = x.reshape(-1, x.shape[-1])
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        found: Tensor = _by_copies(rows, weight, chosen)
    else:
        found = rows.new_empty(len(rows), weight.shape[1])
        for expert, own in _by_expert(chosen, len(weight)):
            found[own] = rows[own] @ weight[expert].T
    return found.view(*x.shape[:-1], weight.shape[1])


@torch.library.register_fake("fxport::expert_linear")
def _expert_linear_fake(x: Tensor, weight: Tensor, experts: Tensor) -> Tensor:
    _check(x, weight, experts)
    return x.new_empty((*x.shape[:-1], weight.shape[1]))


def _by_expert(chosen: Tensor, experts: int) -> Iterator[tuple[int, Tensor]]:
    """Each expert that has rows, with these rows.

    Raises:
        IndexError: a row of an expert that does not exist.
    """
    order = chosen.argsort(stable=True)
    if len(order) and (chosen[order[0]] < 0 or chosen[order[-1]] >= experts):
        raise IndexError(f"an expert that is not one of 0 to {experts - 1}")
    counts = torch.bincount(chosen, minlength=experts).tolist()
    for expert, own in enumerate(order.split(counts)):
        if len(own):
            yield expert, own


def _different_rows(x: Tensor) -> Tensor:
    """The rows of x, each only once where a token's experts all get the same."""
    if x.dim() > 2 and x.stride(-2) == 0 and x.shape[-2] > 0:
        x = x.select(-2, 0)
    return x.reshape(-1, x.shape[-1])


def _kernels(x: Tensor) -> ModuleType | None:
    """Our Triton kernels, where they compute `x`."""
    if not x.is_cuda or not _has_triton():
        return None
    from fxport.ops.triton import experts as triton_experts

    return triton_experts if triton_experts.supports(x.dtype) else None


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _by_copies(rows: Tensor, weight: Tensor, chosen: Tensor) -> Tensor:
    pairs = zip(rows.split(_ROWS), chosen.split(_ROWS), strict=True)
    return torch.cat([torch.bmm(weight[e], r.unsqueeze(-1)).squeeze(-1) for r, e in pairs])


# -- backward ----------------------------------------------------------------------------------


@opaque_op(
    "fxport::expert_outer", "(Tensor grad, Tensor x, Tensor experts, SymInt count) -> Tensor"
)
def _expert_outer(grad: Tensor, x: Tensor, experts: Tensor, count: int) -> Tensor:
    """The gradient of the weights: ``sum over s of expert e: grad[s] outer x[s]``."""
    rows, others = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
    if (kernels := _kernels(x)) is not None:
        by_kernel: Tensor = kernels.outer(rows, others, experts.reshape(-1), count)
        return by_kernel
    found = x.new_zeros(count, rows.shape[1], others.shape[1])
    for expert, own in _by_expert(experts.reshape(-1), count):
        found[expert] = rows[own].T @ others[own]
    return found


@torch.library.register_fake("fxport::expert_outer")
def _expert_outer_fake(grad: Tensor, x: Tensor, experts: Tensor, count: int) -> Tensor:
    return x.new_empty((count, grad.shape[-1], x.shape[-1]))


class _ExpertLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, below: Below, x: Tensor, weight: Tensor, experts: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, experts)
        found: Tensor = below(x, weight, experts)
        return found

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, experts = ctx.saved_tensors
        _, for_x, for_weight, _ = ctx.needs_input_grad
        ops = torch.ops.fxport
        grad_x = ops.expert_linear(grad, weight.transpose(1, 2), experts) if for_x else None
        outer = ops.expert_outer(grad, x, experts, weight.shape[0]) if for_weight else None
        return None, grad_x, outer, None


class _ExpertOuter(torch.autograd.Function):
    """Second derivatives are refused."""

    @staticmethod
    def forward(ctx: Any, below: Below, *arguments: Any) -> Tensor:
        found: Tensor = below(*arguments)
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError("fxport::expert_outer has no autograd formula of its own")


differentiate("fxport::expert_linear", _ExpertLinear)
differentiate("fxport::expert_outer", _ExpertOuter)
autocast("fxport::expert_linear", operands=2)
