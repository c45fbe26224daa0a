"""One attention call prepared for the Triton kernels: addressable tensors, descriptors, arguments.

Loads go through tensor descriptors (TMA), which need a last stride of 1 and everything else aligned
to 16 bytes: inputs that are not so laid out (odd head sizes, slices) are copied first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fxport.ops.band import Band, band_of
from fxport.ops.dropout import keep_scale, threshold
from fxport.ops.layout import addressable
from fxport.ops.params import AttentionParams
from fxport.ops.triton.config import Blocks, blocks_for, lines_together, padded_head_size
from fxport.ops.triton.launch import Launches
from fxport.ops.triton.tiles import (
    BIAS_KEYS,
    BIAS_ROWS,
    BIAS_TILES,
    BOOL_BIAS,
    FLOAT_BIAS,
    score_tile,
)

__all__ = [
    "FARTHEST",
    "INTERPRETED",
    "Call",
    "Incoming",
    "comes_in_tiles",
    "launches_of",
    "layout_of",
    "tile_descriptor",
]

FARTHEST = 2**30  # lengths stay below, limits on j - i within: int32 arithmetic is safe
INTERPRETED = not isinstance(score_tile, triton.JITFunction)  # under TRITON_INTERPRET=1


_Layout: TypeAlias = tuple[torch.Size, tuple[int, ...], torch.dtype] | None


def layout_of(x: Tensor | None) -> _Layout:
    """What the arguments of a kernel depend on of a tensor."""
    return None if x is None else (x.shape, x.stride(), x.dtype)


@lru_cache(maxsize=4096)
def launches_of(*kind: object) -> Launches:
    """What the calls of a kind have in common; made anew where it was forgotten.

    Args:
        kind: all that the arguments of the kernels depend on, but for their tensors' memory.
    """
    return Launches()


def tile_descriptor(x: Tensor, block: int, width: int) -> TensorDescriptor:
    """Tiles ``[1, 1, block, width]`` of an addressable tensor; zeros beyond its ends."""
    # the stride of a single entry is arbitrary in torch, but must be aligned here
    strides = [s if n > 1 else 64 for n, s in zip(x.shape[:-1], x.stride()[:-1], strict=True)]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], [1, 1, block, width])


def _line_descriptor(x: Tensor, block: int) -> TensorDescriptor:
    """Pieces ``[1, block]`` of `Incoming`'s lines."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, block])


def _segments(cu_seqlens: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """First token and end of each token's segment, int32 [length] each."""
    token = torch.arange(length, device=cu_seqlens.device, dtype=torch.int32)
    segment = torch.bucketize(token, cu_seqlens[1:-1], right=True, out_int32=True)
    return cu_seqlens.index_select(0, segment), cu_seqlens[1:].index_select(0, segment)


def comes_in_tiles(bias: Tensor) -> bool:
    """Whether bulk copies can address the tiles of an expanded bias that varies along both axes."""
    unit = 16 // bias.element_size()
    *lead, rows, keys = bias.stride()
    return (
        rows > 0
        and keys == 1
        and not any(s % unit for s in (*lead, rows))
        and (bias.data_ptr() % 16 == 0)
    )


def _without_repeats(x: Tensor) -> Tensor:
    """`x` [B, H, ...] with one entry of a dimension that is broadcast: what is in memory."""
    return x[: 1 if x.stride(0) == 0 else None, : 1 if x.stride(1) == 0 else None]


def _limit(value: int | None) -> int:
    return 0 if value is None else max(-FARTHEST, min(FARTHEST, value))


@dataclass(frozen=True)
class Incoming:
    """What backward's kernels read beside the inputs.

    Attributes:
        grad: out's gradient, addressable.
        norm, delta: float32 ``[B * Hq, Tq rounded up]``, see `delta_kernel`.
        rest: likewise, see `exact_norm_kernel`; only with a floating bias.
    """

    grad: Tensor
    norm: Tensor
    delta: Tensor
    rest: Tensor | None


@dataclass(frozen=True)
class Call:
    """One call's tensors and numbers as the kernels want them.

    Attributes:
        q, k, v: as `addressable` gives them.
        bias: expanded to ``[B, Hq, Tq, Tk]`` (broadcast dimensions have stride 0), bool as uint8.
        bias_kind: the kernels' BIAS, see tiles.py.
        first, end: of each packed token's segment.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    bias_kind: int
    sinks: Tensor | None
    slopes: Tensor | None
    seed: Tensor | None
    first: Tensor | None
    end: Tensor | None
    band: Band
    params: AttentionParams

    @staticmethod
    def of(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        sinks: Tensor | None,
        slopes: Tensor | None,
        cu_seqlens: Tensor | None,
        seed: Tensor | None,
        params: AttentionParams,
    ) -> Call:
        """Prepare the arguments of `forward`."""
        rows, columns = q.shape[2], k.shape[2]
        kind = 0
        if bias is not None:
            kind = (BOOL_BIAS if bias.dtype == torch.bool else FLOAT_BIAS).value
            bias = bias.view(torch.uint8) if bias.dtype == torch.bool else bias
            bias = bias.expand(q.shape[0], q.shape[1], rows, columns)
            kind |= BIAS_ROWS.value if bias.stride(2) else 0
            kind |= BIAS_KEYS.value if bias.stride(3) else 0
            kind |= BIAS_TILES.value if comes_in_tiles(bias) else 0
        first, end = (None, None) if cu_seqlens is None else _segments(cu_seqlens, rows)
        return Call(
            addressable(q), addressable(k), addressable(v), bias, kind,
            None if sinks is None else sinks.contiguous(),
            None if slopes is None else slopes.contiguous(),
            seed if params.dropout_p > 0 else None,
            first, end, band_of(params, rows, columns), params,
        )  # fmt: skip

    def launches(self, *more: object) -> Launches:
        """Those of the calls that are of this kind, and equal in `more`."""
        tensors = (self.q, self.k, self.v, self.bias, self.sinks, self.slopes, self.seed)
        layouts = [layout_of(x) for x in tensors]
        return launches_of(self.q.device, self.params, self.first is None, *layouts, *more)

    def tensors(self, incoming: Incoming | None = None) -> dict[str, Tensor | None]:
        """The tensors that all kernels read, by argument; with those of all backward kernels."""
        found = {
            "q_desc": self.q,
            "k_desc": self.k,
            "v_desc": self.v,
            "bias_ptr": self.stored_bias,
            "slopes_ptr": self.slopes,
            "seed_ptr": self.seed,
            "first_ptr": self.first,
            "end_ptr": self.end,
        }
        if incoming is not None:
            found["grad_desc"] = incoming.grad
            found["norm_desc"] = incoming.norm
            found["delta_desc"] = incoming.delta
            found["rest_desc"] = incoming.rest
        return found

    @property
    def stored_bias(self) -> Tensor | None:
        """The bias as the kernels read it: where it comes in tiles, only what is in memory."""
        if self.bias is None or not self.bias_kind & BIAS_TILES.value:
            return self.bias
        return _without_repeats(self.bias)

    @property
    def plain(self) -> bool:
        """Whether a positive factor is all that happens to the scores."""
        changed = self.bias is not None or self.slopes is not None or self.params.softcap > 0
        return not changed and self.params.scale > 0

    @property
    def crowded(self) -> bool:
        """Whether shared memory has to hold more than tiles of q, k, v and out's gradient."""
        return not self.plain or self.seed is not None or self.first is not None

    @property
    def has_bias_tiles(self) -> bool:
        """Whether the bias varies along both lengths, so that it is read in whole tiles."""
        both = BIAS_ROWS.value | BIAS_KEYS.value
        return self.bias_kind & both == both

    @property
    def keys_apart(self) -> bool:
        """Whether dk and dv are made by a launch each: together they do not fit in registers."""
        widest = padded_head_size(max(self.q.shape[3], self.v.shape[3]))
        return widest > 128 and self.q.dtype != torch.float32 and not INTERPRETED

    def section(self, *read: Tensor) -> int:
        """How many lines (batch and head) run together, see `place_of_program`.

        All of them with tiles of a bias that lines share: else each line fetches them again.
        """
        if self.bias is not None and self.has_bias_tiles and 0 in self.bias.stride()[:2]:
            return self.q.shape[0] * self.q.shape[1]
        return lines_together(*read, interpreted=INTERPRETED)

    def blocks(self, kernel: str) -> Blocks:
        """The block shapes of one of the kernels."""
        blocks = self.blocks_or_none(kernel)
        assert blocks is not None, kernel
        return blocks

    def blocks_or_none(self, kernel: str) -> Blocks | None:
        """Likewise of one that not every kind of call has."""
        if self.bias is not None and self.has_bias_tiles and not kernel.startswith("bias"):
            kernel += "_wide_bias" if self.bias.element_size() > 2 else "_bias"
        elif self.crowded and kernel in ("query", "key_only"):
            kernel += "_bias"  # leaves room as well
        sizes = self.q.shape[3], self.v.shape[3]
        return blocks_for(kernel, self.q.dtype, *sizes, INTERPRETED)

    def arguments(self, blocks: Blocks, tensors: dict[str, Tensor | None]) -> dict[str, Any]:
        """A kernel's arguments: `tensors`, and those that all kernels share."""
        return {
            **tensors,
            **self._descriptors(blocks, tensors),
            **self.numbers(),
            **self._constants(blocks),
        }

    def _descriptors(
        self, blocks: Blocks, tensors: dict[str, Tensor | None]
    ) -> dict[str, TensorDescriptor | None]:
        size, v_size = padded_head_size(self.q.shape[3]), padded_head_size(self.v.shape[3])
        tiles = {
            "q_desc": (blocks.m, size),
            "k_desc": (blocks.n, size),
            "v_desc": (blocks.n, v_size),
            "grad_desc": (blocks.m, v_size),
        }
        if self.bias_kind & BIAS_TILES.value:
            tiles["bias_ptr"] = (blocks.m, blocks.n)
        found: dict[str, TensorDescriptor | None] = {}
        for name, tile in tiles.items():
            if (x := tensors.get(name)) is not None:
                found[name] = tile_descriptor(x, *tile)
        for name in ("norm_desc", "delta_desc", "rest_desc"):
            if (x := tensors.get(name)) is not None:
                found[name] = _line_descriptor(x, blocks.m)
        return found

    def numbers(self) -> dict[str, int | float]:
        """The numbers among the arguments that all kernels share."""
        params = self.params
        strides = (0, 0, 0, 0) if self.bias is None else self.bias.stride()
        return {
            **{f"bias_stride_{name}": n for name, n in zip("bhij", strides, strict=True)},
            "group": self.q.shape[1] // self.k.shape[1],
            "rows": self.q.shape[2],
            "columns": self.k.shape[2],
            "low": _limit(self.band.low),
            "high": _limit(self.band.high),
            "q_offset": params.q_offset,
            "head_offset": params.head_offset,
            "scale": params.scale * (math.log2(math.e) if self.plain else 1.0),
            "softcap": params.softcap,
            "threshold": threshold(params.dropout_p),
            "keep_scale": keep_scale(params.dropout_p),
        }

    def _constants(self, blocks: Blocks) -> dict[str, int | bool | str | None]:
        """Compile-time switches: what a call lacks costs nothing."""
        return {
            "BLOCK_M": blocks.m,
            "BLOCK_N": blocks.n,
            "BLOCK_D": padded_head_size(self.q.shape[3]),
            "BLOCK_DV": padded_head_size(self.v.shape[3]),
            "HAS_LOW": self.band.low is not None,
            "HAS_HIGH": self.band.high is not None,
            "PACKED": self.first is not None,
            "SOFTCAP": self.params.softcap > 0,
            "ALIBI": self.slopes is not None,
            "BIAS": self.bias_kind,
            "DROPOUT": self.seed is not None,
            "PRECISION": "tf32x3" if self.q.dtype == torch.float32 else None,
            "num_warps": blocks.warps,
            "num_stages": blocks.stages,
        }
