"""Which forward calls the kernel in Gluon takes, and its launch.

Gluon is experimental: the kernel runs under the release of Triton alone that it was measured with,
on the GPU it was made for. Everything else is `forward_kernel`'s.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from fxport.ops.triton.call import INTERPRETED, Call
from fxport.ops.triton.config import lines_together
from fxport.ops.triton.launch import Launches

__all__ = ["forward", "refuses"]

_RELEASES = ("3.6.",)
_TARGET = ("cuda", 90)
_SIZE = 128
_LEAST_ROWS = 1024
_DTYPES = (torch.bfloat16, torch.float16)
_KEYS, _STAGES = 128, 2
_ROWS = 128


def refuses(call: Call) -> str | None:
    """Why the kernel does not take a forward call; None if it does."""
    q, k = call.q, call.k
    if q.shape[2] < _LEAST_ROWS:
        return f"fewer than {_LEAST_ROWS} rows: not faster"
    if q.shape[3] != _SIZE or call.v.shape[3] != _SIZE:
        return f"head size other than {_SIZE}"
    if q.dtype not in _DTYPES or k.dtype != q.dtype or call.v.dtype != q.dtype:
        return f"no kernel for {q.dtype}"
    if not call.plain or call.crowded or call.sinks is not None:
        return "more than a band and a positive scale"
    return _unknown_here(q.device)


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
    }

    def prepare() -> tuple[tuple[int], dict[str, Any]]:
        batch, heads, rows, _ = call.q.shape
        group = heads // call.k.shape[1]
        numbers = call.numbers()
        names = ("rows", "columns", "low", "high", "scale")
        return (triton.cdiv(rows, _ROWS) * batch * heads,), {
            "q_desc": _descriptor(call.q, _ROWS // 2),
            "k_desc": _descriptor(call.k, _KEYS),
            "v_desc": _descriptor(call.v, _KEYS),
            "out_desc": _descriptor(out, _ROWS // 2),
            "lse_ptr": lse,
            "heads": heads,
            "group": group,
            "section": group * lines_together(call.k, call.v),
            **{name: numbers[name] for name in names},
            "BLOCK_N": _KEYS,
            "STAGES": _STAGES,
            "HAS_LOW": call.band.low is not None,
            "HAS_HIGH": call.band.high is not None,
            "num_warps": 4,
        }

    launches.launch(gluon_forward_kernel, tensors, prepare)


def _descriptor(x: Tensor, block: int) -> Any:
    """As `tile_descriptor`, in Gluon's class and with the layout that the tiles get."""
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    strides = [s if n > 1 else 64 for n, s in zip(x.shape[:-1], x.stride()[:-1], strict=True)]
    layout = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    return TensorDescriptor(x, list(x.shape), [*strides, 1], [1, 1, block, _SIZE], layout)
