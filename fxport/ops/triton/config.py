"""Block shapes of the Triton attention kernels: a table, not an autotuner.

An autotuner would compile dozens of variants of each kernel on the first call of every shape, time
them on a GPU that may be busy, and could choose differently on each rank or run: other bits from
the same inputs. The table depends on dtype and head size alone. It is made for Hopper (sm_90):
tiles that fill its matrix instruction (64 rows for each group of 4 warps), accumulators within 255
registers a thread, shared memory within 227 KB. `python -m fxport.tools.triton_resources` prints
what the compiler makes of each entry.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = [
    "HALF",
    "SINGLE",
    "Blocks",
    "blocks_for",
    "fills_the_gpu",
    "group_parts",
    "lines_together",
    "padded_head_size",
]


@dataclass(frozen=True)
class Blocks:
    """How one kernel is cut up: rows of q and of k per tile, warps, stages of the load pipeline."""

    m: int
    n: int
    warps: int
    stages: int


# "_bias": with whole tiles of a bias, which have to fit as well; "_wide_bias": of a float32 one;
# "_grad": writes its gradient; "_add": adds it to that of other batches (other kernels do it where
# there is no entry); "_only": dk and dv apart, see `Call.keys_apart`
HALF: dict[str, dict[int, Blocks]] = {
    "forward": {
        64: Blocks(64, 128, 4, 2),
        128: Blocks(128, 64, 4, 2),
        256: Blocks(128, 64, 8, 2),
    },
    "forward_bias": {
        64: Blocks(128, 64, 8, 3),
        128: Blocks(128, 64, 4, 2),
        256: Blocks(128, 32, 8, 2),
    },
    "forward_wide_bias": {
        64: Blocks(128, 64, 8, 3),
        128: Blocks(128, 64, 8, 3),
        256: Blocks(128, 32, 8, 2),
    },
    "key": {64: Blocks(64, 64, 4, 3), 128: Blocks(64, 64, 4, 2), 256: Blocks(64, 64, 8, 2)},
    "key_bias": {64: Blocks(64, 64, 4, 3), 128: Blocks(64, 64, 4, 2), 256: Blocks(64, 64, 8, 2)},
    "key_wide_bias": {
        64: Blocks(64, 64, 4, 3),
        128: Blocks(64, 64, 4, 2),
        256: Blocks(64, 64, 8, 2),
    },
    "key_only": {256: Blocks(32, 128, 8, 3)},
    "key_only_bias": {256: Blocks(32, 128, 8, 2)},
    "key_only_wide_bias": {256: Blocks(32, 128, 8, 2)},
    "value_only": {256: Blocks(64, 128, 8, 2)},
    "value_only_bias": {256: Blocks(64, 128, 8, 2)},
    "value_only_wide_bias": {256: Blocks(32, 128, 8, 2)},
    "query": {64: Blocks(128, 64, 4, 3), 128: Blocks(128, 64, 8, 3), 256: Blocks(128, 32, 8, 3)},
    "query_bias": {
        64: Blocks(128, 64, 4, 3),
        128: Blocks(128, 64, 8, 3),
        256: Blocks(128, 32, 8, 2),
    },
    "query_wide_bias": {
        64: Blocks(128, 64, 4, 3),
        128: Blocks(128, 64, 8, 2),  # with three, dropout and all else do not fit
        256: Blocks(128, 32, 8, 2),
    },
    "query_grad": {
        64: Blocks(128, 64, 4, 3),
        128: Blocks(128, 64, 8, 3),
        256: Blocks(128, 32, 8, 2),
    },
    "query_grad_bias": {
        64: Blocks(64, 64, 4, 3),
        128: Blocks(128, 64, 8, 3),
        256: Blocks(128, 32, 8, 2),
    },
    "query_grad_wide_bias": {
        64: Blocks(64, 64, 4, 2),
        128: Blocks(128, 64, 8, 2),
        256: Blocks(64, 32, 4, 2),  # with 128 rows, dropout and all else do not fit
    },
    "query_add_bias": {64: Blocks(64, 64, 4, 3), 128: Blocks(128, 64, 8, 3)},
    "query_add_wide_bias": {64: Blocks(64, 64, 4, 2), 128: Blocks(64, 32, 4, 3)},
    "bias": {64: Blocks(128, 64, 8, 2), 128: Blocks(64, 128, 4, 1), 256: Blocks(128, 64, 8, 1)},
    "bias_line": {
        64: Blocks(128, 64, 8, 2),
        128: Blocks(128, 64, 8, 2),
        256: Blocks(128, 64, 8, 1),
    },
}
# float32 goes through the matrix units as three tf32 products whose operands, in two parts each,
# sit in registers: above head size 64 they spill, whatever the tile. Right, but not fast.
# No 16 rows by 64 keys with 8 warps: Triton 3.6 makes `key_kernel` read past its shared memory.
_SINGLE_ROWS = {64: Blocks(64, 32, 4, 2), 128: Blocks(64, 16, 4, 2), 256: Blocks(64, 16, 4, 2)}
_SINGLE_QUERY = {64: Blocks(64, 16, 4, 2), 128: Blocks(64, 16, 4, 2), 256: Blocks(64, 16, 4, 2)}
_SINGLE_BIAS = {64: Blocks(64, 32, 4, 2), 128: Blocks(64, 16, 4, 2), 256: Blocks(64, 16, 4, 1)}
_SINGLE_KEY = {64: Blocks(16, 64, 4, 2), 128: Blocks(16, 128, 8, 2), 256: Blocks(32, 64, 8, 1)}
SINGLE: dict[str, dict[int, Blocks]] = {
    "forward": _SINGLE_ROWS,
    "forward_bias": _SINGLE_ROWS,
    "forward_wide_bias": _SINGLE_ROWS,
    "key": _SINGLE_KEY,
    "key_bias": _SINGLE_KEY,
    "key_wide_bias": _SINGLE_KEY,
    "query": _SINGLE_QUERY,
    "query_bias": _SINGLE_QUERY,
    "query_grad": _SINGLE_QUERY,
    "query_grad_bias": _SINGLE_QUERY,
    "query_grad_wide_bias": _SINGLE_QUERY,
    "query_wide_bias": _SINGLE_QUERY,
    "bias": _SINGLE_BIAS,
    "bias_line": _SINGLE_BIAS,
}
# the interpreter works block by block in NumPy: small blocks make small tests cross many borders
_INTERPRETED = Blocks(16, 32, 4, 1)


# of the second level cache (50 MB on an H100, 60 on an H200), what lines that are read together
# fill: 4 to 16 MB are the same within 2%, more is slower, all lines are up to 40% slower
_CACHED = 2**23
# programs that keep the largest GPU of the table busy twice over (132 multiprocessors)
_MANY_PROGRAMS = 264


def group_parts(programs: int, group: int, interpreted: bool) -> int:
    """Into how many parts `key_kernel` cuts a group of query heads to have enough programs.

    Depends on sizes alone, not on the GPU at hand: the order of additions decides the last bits.
    """
    wanted = 8 if interpreted else _MANY_PROGRAMS
    parts = [n for n in range(1, group + 1) if group % n == 0]
    return next((n for n in parts if n * programs >= wanted), group)


def fills_the_gpu(programs: int, interpreted: bool) -> bool:
    """Whether a launch alone is worth its time; by sizes alone, as `group_parts`."""
    return programs >= (4 if interpreted else _MANY_PROGRAMS // 2)


def lines_together(*read: torch.Tensor, interpreted: bool) -> int:
    """How many lines of tensors [B, H, T, D] to read at the same time: what the cache holds."""
    line = sum(x.shape[2] * x.shape[3] * x.element_size() for x in read)
    return max(1, (2**13 if interpreted else _CACHED) // line)


def padded_head_size(size: int) -> int:
    """The tile width for a head size: a power of two, at least 16 (the least that tl.dot takes)."""
    return max(16, 1 << (size - 1).bit_length())


def blocks_for(
    kernel: str, dtype: torch.dtype, size: int, v_size: int, interpreted: bool
) -> Blocks | None:
    """The entry, if any, for a kernel (a key of the tables) and head sizes of at most 256."""
    if interpreted:
        return _INTERPRETED
    table = SINGLE if dtype == torch.float32 else HALF
    return table.get(kernel, {}).get(max(64, padded_head_size(max(size, v_size))))
