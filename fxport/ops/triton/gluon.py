"""Which calls the kernels in Gluon take, and their launches.

Gluon is experimental: they run under the release of Triton alone that they were measured with, on
the GPU they were made for. Everything else is for the other kernels.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch
import triton
from torch import Tensor

from fxport.ops.band import Band
from fxport.ops.facts import Facts
from fxport.ops.layout import empty_heads
from fxport.ops.triton.call import INTERPRETED, Call, Incoming, comes_in_tiles
from fxport.ops.triton.config import fills_the_gpu
from fxport.ops.triton.launch import Launches
from fxport.ops.triton.tiles import BIAS_TILES

__all__ = ["backward", "before_cudnn", "forward", "refuses", "refuses_backward"]

_RELEASES = ("3.6.",)
_TARGET = ("cuda", 90)
_SIZE, _BIASED_SIZES = 128, (64, 128)  # at 64 and without a bias: not faster
_LEAST_ROWS = 512
_BEFORE_CUDNN = 4096  # causal; 2 to 7% faster from here on, docs/performance.md
_PACKED_PROGRAMS = 1024  # sequences differ in length: few programs end unevenly
_DTYPES = (torch.bfloat16, torch.float16)
_ROWS, _GROUP_ROWS = 128, 64  # of a program forward, of one of its two groups of warps
_BACKWARD_ROWS = 64
_KEYS, _STAGES = 128, 2
_SCALE_ROWS = 32


def refuses(call: Call) -> str | None:
    """Why the kernel does not take a forward call; None if it does."""
    if not call.plain or call.seed is not None or call.sinks is not None:
        return "more than a band, packed sequences and a positive scale"
    return _refuses_both(call, (_SIZE,))


def before_cudnn(facts: Facts) -> bool:
    """Whether forward is faster than cuDNN's, for a call that cuDNN takes."""
    rows, size = facts.q_shape[2:]
    return (
        facts.needs is None
        and facts.band == Band(None, 0)
        and rows >= _BEFORE_CUDNN
        and size == facts.v_shape[3] == _SIZE
        and facts.dtype in _DTYPES
        and facts.params.scale > 0
        and _unknown_here(torch.device("cuda", torch.cuda.current_device())) is None
    )


def _refuses_both(call: Call, sizes: tuple[int, ...]) -> str | None:
    q, k = call.q, call.k
    if q.shape[2] < _LEAST_ROWS:
        return f"fewer than {_LEAST_ROWS} rows: not faster"
    if q.shape[3] not in sizes or call.v.shape[3] != q.shape[3]:
        return f"head size not one of {sizes}"
    if q.dtype not in _DTYPES or k.dtype != q.dtype or call.v.dtype != q.dtype:
        return f"no kernel for {q.dtype}"
    return _unknown_here(q.device)


def refuses_backward(call: Call, dbias: Tensor | None) -> str | None:
    """Likewise of backward, where q, k and v all need their gradient; arguments as `backward`.

    A bias may come as tiles of q's dtype. Sinks make no difference: lse knows of them.
    """
    if torch.are_deterministic_algorithms_enabled():
        return "deterministic algorithms are asked for: dq is summed in no fixed order"
    bias = call.bias
    in_tiles = bias is not None and call.has_bias_tiles and call.bias_kind & BIAS_TILES.value
    if not in_tiles and not call.plain:
        return "more than a band, a positive scale, and a bias of both lengths"
    if bias is not None and bias.dtype != call.q.dtype:
        return f"a bias in {bias.dtype}"
    if dbias is not None and not comes_in_tiles(dbias):
        return "rows of the bias' gradient are not aligned"
    if call.slopes is not None or call.params.softcap > 0:
        return "the scores are changed otherwise"
    if call.seed is not None:
        return "dropout"
    if reason := _refuses_both(call, (_SIZE,) if bias is None else _BIASED_SIZES):
        return reason
    kv_heads, columns = call.k.shape[1:3]
    programs = triton.cdiv(columns, _KEYS) * _batches_of_a_launch(call, dbias) * kv_heads
    uneven = call.first is not None and programs < _PACKED_PROGRAMS
    if uneven or not fills_the_gpu(programs, INTERPRETED):
        return "too few blocks of keys: not faster"
    return None


def _batches_of_a_launch(call: Call, dbias: Tensor | None) -> int:
    """Of backward: batches that share a bias write its gradient one after the other."""
    batch = call.q.shape[0]
    return 1 if dbias is not None and dbias.shape[0] < batch else batch


@cache
def _unknown_here(device: torch.device) -> str | None:
    """Likewise of a device, which is current."""
    if INTERPRETED:
        return "Gluon has no interpreter"
    target = triton.runtime.driver.active.get_current_target()
    if (target.backend, target.arch) != _TARGET:
        return f"not made for {target.backend} {target.arch}"
    if not triton.__version__.startswith(_RELEASES):
        return f"not measured with Triton {triton.__version__}"
    return None


def forward(call: Call, launches: Launches, out: Tensor, lse: Tensor) -> None:
    """Writes out and lse of a call that is not refused."""
    from fxport.ops.triton.gluon_forward import gluon_forward_kernel

    tensors = {
        "q_desc": call.q,
        "k_desc": call.k,
        "v_desc": call.v,
        "out_desc": out,
        "lse_ptr": lse,
        "first_ptr": call.first,
        "end_ptr": call.end,
    }

    def prepare() -> tuple[tuple[int], dict[str, Any]]:
        batch, heads, rows, size = call.q.shape
        group = heads // call.k.shape[1]
        return (triton.cdiv(rows, _ROWS) * batch * heads,), {
            "q_desc": _descriptor(call.q, _GROUP_ROWS, size),
            "k_desc": _descriptor(call.k, _KEYS, size),
            "v_desc": _descriptor(call.v, _KEYS, size),
            "out_desc": _descriptor(out, _GROUP_ROWS, size),
            "lse_ptr": lse,
            "first_ptr": call.first,
            "end_ptr": call.end,
            "heads": heads,
            "section": group * call.section(call.k, call.v),
            "BLOCK_N": _KEYS,
            "num_warps": 4,
            **_arguments(call),
        }

    launches.launch(gluon_forward_kernel, tensors, prepare)


def backward(
    call: Call, launches: Launches, incoming: Incoming, dbias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv of a call that is not refused. The last bits of dq differ from run to run.

    Args:
        dbias: where to write the bias' gradient [B or 1, Hq, Tq, Tk]; batches that share it come
            one after the other, and add up in its dtype.
    """
    from fxport.ops.triton.gluon_backward import (
        ADDED,
        STORED,
        gluon_backward_kernel,
        scale_kernel,
    )

    batch, heads, rows, size = call.q.shape
    kv_heads, columns = call.k.shape[1:3]
    total = call.q.new_zeros(call.q.shape, dtype=torch.float32)
    dq = empty_heads(call.q, batch, heads, rows, size)
    dk, dv = (empty_heads(call.k, batch, kv_heads, columns, size) for _ in range(2))
    tensors = {
        "q_desc": call.q,
        "k_desc": call.k,
        "v_desc": call.v,
        "grad_desc": incoming.grad,
        "norm_desc": incoming.norm,
        "rest_desc": incoming.rest,
        "delta_desc": incoming.delta,
        "bias_desc": call.stored_bias,
        "dq_desc": total,
        "dk_desc": dk,
        "dv_desc": dv,
        "dbias_desc": dbias,
        "first_ptr": call.first,
        "end_ptr": call.end,
    }
    each = _batches_of_a_launch(call, dbias)

    def prepare(first: int) -> tuple[tuple[int], dict[str, Any]]:
        strides = (0, 0) if call.bias is None else call.bias.stride()[:2]
        added = 0 if dbias is None else (ADDED if first else STORED).value
        return (triton.cdiv(columns, _KEYS) * each * kv_heads,), {
            **{name: _backward_argument(name, x) for name, x in tensors.items()},
            "first_line": first * kv_heads,
            "bias_per_batch": int(strides[0] > 0),
            "bias_per_head": int(strides[1] > 0),
            "kv_heads": kv_heads,
            "section": call.section(call.q, incoming.grad),
            "grad_scale": call.params.scale,
            "BLOCK_M": _BACKWARD_ROWS,
            "BLOCK_N": _KEYS,
            "RAGGED": columns % _KEYS != 0,
            "BIAS": call.bias is not None,
            "BIAS_GRAD": added,
            "num_warps": 8,
            **_arguments(call),
        }

    for first in range(0, batch, each):
        launches.launch(gluon_backward_kernel, tensors, partial(prepare, first), f"gluon {first}")
    scaled = {"sum_ptr": total, "dq_ptr": dq}

    def prepare_scaling() -> tuple[tuple[int], dict[str, Any]]:
        return (triton.cdiv(rows, _SCALE_ROWS) * batch * heads,), {
            **scaled,
            "dq_stride_b": dq.stride(0),
            "dq_stride_h": dq.stride(1),
            "dq_stride_t": dq.stride(2),
            "heads": heads,
            "rows": rows,
            "grad_scale": call.params.scale,
            "BLOCK_M": _SCALE_ROWS,
            "SIZE": size,
        }

    launches.launch(scale_kernel, scaled, prepare_scaling)
    return dq, dk, dv


def _arguments(call: Call) -> dict[str, Any]:
    """What both kernels take."""
    numbers = call.numbers()
    names = ("group", "rows", "columns", "low", "high", "scale")
    return {
        **{name: numbers[name] for name in names},
        "STAGES": _STAGES,
        "HAS_LOW": call.band.low is not None,
        "HAS_HIGH": call.band.high is not None,
        "PACKED": call.first is not None,
    }


def _descriptor(x: Tensor, block: int, width: int) -> Any:
    """As `tile_descriptor`, in Gluon's class and with the layout that the tiles get."""
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    strides = [s if n > 1 else 64 for n, s in zip(x.shape[:-1], x.stride()[:-1], strict=True)]
    layout = NVMMASharedLayout(128, 8 * x.element_size(), rank=4)
    return TensorDescriptor(x, list(x.shape), [*strides, 1], [1, 1, block, width], layout)


def _backward_argument(name: str, x: Tensor | None) -> Any:
    if x is None or name in ("first_ptr", "end_ptr"):
        return x
    if name in ("norm_desc", "rest_desc", "delta_desc"):
        return _line_descriptor(x)
    of_rows = name in ("q_desc", "grad_desc", "dq_desc", "bias_desc", "dbias_desc")
    width = _KEYS if name in ("bias_desc", "dbias_desc") else x.shape[3]
    return _descriptor(x, _BACKWARD_ROWS if of_rows else _KEYS, width)


def _line_descriptor(x: Tensor) -> Any:
    """Pieces of `Incoming`'s lines."""
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    layout = NVMMASharedLayout(0, 8 * x.element_size(), rank=2)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, _BACKWARD_ROWS], layout)
