"""What `fxport::attention` accepts. Every check is here; real and fake kernels both run it."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fxport.ops.facts import Described
from fxport.ops.params import AttentionParams

__all__ = ["check_arguments", "check_segments", "check_transforms"]

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _check(condition: bool | torch.SymBool, message: str, *values: object) -> None:
    """ValueError unless `condition`; on symbolic sizes, a guard. Formats only when it fails."""
    if condition is not True:
        torch._check_value(condition, lambda: "fxport::attention: " + message.format(*values))


def check_transforms() -> None:
    """Raise NotImplementedError in forward-mode AD, where a custom op would drop the tangents."""
    if forward_ad._current_level >= 0:
        raise NotImplementedError("fxport::attention has no forward-mode derivative")


def check_arguments(
    q: Described,
    k: Described,
    v: Described,
    bias: Described | None,
    sinks: Described | None,
    alibi_slopes: Described | None,
    cu_seqlens: Described | None,
    seed: Described | None,
    params: AttentionParams,
) -> None:
    """Raise ValueError, naming the argument, for what the op does not define.

    Reads shapes, dtypes and devices, never values: fake tensors will do, and `Operand`.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        _check(x.dim() == 4, "{} must be [batch, heads, length, size], got {} dims", name, x.dim())
        _check(x.dtype in _DTYPES, "{} must be floating, got {}", name, x.dtype)
        _check(x.dtype == q.dtype, "{} is {}, q is {}", name, x.dtype, q.dtype)
        _check(x.shape[0] == q.shape[0], "{} has batch {}, not {}", name, x.shape[0], q.shape[0])
    q_heads, kv_heads = q.shape[1], k.shape[1]
    _check(v.shape[1] == kv_heads, "v has {} heads, k has {}", v.shape[1], kv_heads)
    _check(v.shape[2] == k.shape[2], "v has length {}, k has {}", v.shape[2], k.shape[2])
    _check(k.shape[3] == q.shape[3], "k has head size {}, q has {}", k.shape[3], q.shape[3])
    _check(kv_heads > 0, "k has no heads")
    _check(
        q_heads % kv_heads == 0, "{} query heads are no multiple of {} kv heads", q_heads, kv_heads
    )
    _check_bias(q, k, bias)
    _check_per_head("sinks", q, sinks)
    _check_per_head("alibi_slopes", q, alibi_slopes)
    _check_packing(q, k, cu_seqlens)
    _check_numbers(seed, params)
    _check_chunks(q, k, bias, params)
    for name, other in (
        ("k", k),
        ("v", v),
        ("bias", bias),
        ("sinks", sinks),
        ("alibi_slopes", alibi_slopes),
        ("cu_seqlens", cu_seqlens),
        ("seed", seed),
    ):
        _check(other is None or other.device == q.device, "{} is not on {}", name, q.device)


def _check_precision(name: str, q: Described, x: Described) -> None:
    """Softmax runs in float32 unless q is float64: a float64 term would lose bits in silence."""
    _check(x.dtype in _DTYPES, "{} must be floating, got {}", name, x.dtype)
    _check(
        x.dtype != torch.float64 or q.dtype == torch.float64,
        "{} is float64, but softmax runs in float32 for {} inputs: convert it",
        name,
        q.dtype,
    )


def _check_bias(q: Described, k: Described, bias: Described | None) -> None:
    if bias is None:
        return
    _check(bias.dim() <= 4, "bias must have at most 4 dims, got {}", bias.dim())
    full = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    for size, whole in zip(reversed(bias.shape), reversed(full), strict=False):
        fits = size == 1 or size == whole
        _check(fits, "bias {} does not broadcast to {}", tuple(bias.shape), full)
    if bias.dtype != torch.bool:
        _check_precision("bias", q, bias)


def _check_per_head(name: str, q: Described, x: Described | None) -> None:
    if x is None:
        return
    _check(x.dim() == 1, "{} must be [query heads], got {} dims", name, x.dim())
    _check(x.shape[0] == q.shape[1], "{} has {} of {} heads", name, x.shape[0], q.shape[1])
    _check_precision(name, q, x)


def _check_packing(q: Described, k: Described, cu_seqlens: Described | None) -> None:
    if cu_seqlens is None:
        return
    _check(cu_seqlens.dtype == torch.int32, "cu_seqlens must be int32, got {}", cu_seqlens.dtype)
    _check(cu_seqlens.dim() == 1, "cu_seqlens must have 1 dim, got {}", cu_seqlens.dim())
    _check(cu_seqlens.shape[0] >= 2, "cu_seqlens must hold at least one segment")
    _check(q.shape[0] == 1, "packed sequences need batch 1, got {}", q.shape[0])
    _check(
        q.shape[2] == k.shape[2],
        "packed sequences need q and k of one length, got {} and {}",
        q.shape[2],
        k.shape[2],
    )


def _check_numbers(seed: Described | None, params: AttentionParams) -> None:
    _check(math.isfinite(params.scale), "scale must be finite, got {}", params.scale)
    _check(params.window_left >= -1, "window_left must be >= -1, got {}", params.window_left)
    _check(params.window_right >= -1, "window_right must be >= -1, got {}", params.window_right)
    _check(
        math.isfinite(params.softcap) and params.softcap >= 0,
        "softcap must be finite and >= 0, got {}",
        params.softcap,
    )
    _check(params.head_offset >= 0, "head_offset must be >= 0, got {}", params.head_offset)
    _check(params.chunk >= 0, "chunk must be >= 0, got {}", params.chunk)
    p = params.dropout_p
    _check(0 <= p < 1, "dropout_p must be in [0, 1), got {}", p)
    _check(p == 0 or seed is not None, "dropout needs a seed")
    if seed is not None:
        _check(seed.dtype == torch.int64, "seed must be int64, got {}", seed.dtype)
        _check(seed.dim() == 1 and seed.shape[0] == 1, "seed must have shape [1]")


def _check_chunks(
    q: Described, k: Described, bias: Described | None, params: AttentionParams
) -> None:
    if params.chunk == 0:
        return
    _check(bias is None, "chunks go with no bias")
    _check(params.q_offset == 0, "chunks need q_offset 0, got {}", params.q_offset)
    rows, columns = q.shape[2], k.shape[2]
    _check(rows == columns, "chunks need q and k of one length, got {} and {}", rows, columns)


def check_segments(cu_seqlens: Tensor, length: int) -> None:
    """Raise ValueError unless cu_seqlens rises from 0 to `length`. Reads values: waits on a GPU."""
    borders = cu_seqlens.tolist()
    _check(
        borders[0] == 0 and borders[-1] == length and borders == sorted(borders),
        "cu_seqlens must rise from 0 to {}, got {} .. {}",
        length,
        borders[0],
        borders[-1],
    )
