"""Which attention weights dropout keeps: a pure function of the seed and global coordinates.

The bits depend on nothing but (seed, batch b, global query head h, row i, column j), so every
implementation, every block size, the recomputation in backward and every tensor-parallel rank
agree on them. The generator is Philox-4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random
numbers: as easy as 1, 2, 3", SC 2011); ``triton.language.philox`` computes the same words.

The recipe, to be followed bit by bit by every kernel:

* ``h`` is the index among q's heads plus ``head_offset``; ``i`` and ``j`` index the rows of q and k
  as passed (``q_offset`` plays no part; packed sequences count through the whole packed tensor);
* key words: ``k0 = seed & 0xffffffff``, ``k1 = (seed >> 32) & 0xffffffff`` (seed: int64);
* counter words: ``c0 = j // 4``, ``c1 = i``, ``c2 = h``, ``c3 = b``;
* of the four 32-bit output words take number ``j % 4``: one Philox call serves 4 neighbouring j;
* keep the weight iff ``(word >> 1) >= threshold(p)``, ``threshold(p) = floor(p * 2**31)`` (the
  shift is logical; both sides then fit a signed 32-bit integer);
* kept weights are multiplied by ``1 / (1 - p)``.

In Triton, for a tile whose columns start at a multiple of 4::

    c0 = first_j // 4 + tl.arange(0, BLOCK_N // 4)        # int32, and c1, c2, c3 too
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, c2, c3)
    word = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))    # in order of j
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["keep_mask", "keep_scale", "philox", "threshold"]

_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def threshold(p: float) -> int:
    """A weight is kept iff the upper 31 bits of its word are at least this. 0 <= p < 1."""
    return int(p * 2**31)


def keep_scale(p: float) -> float:
    """The factor on kept weights."""
    return 1.0 / (1.0 - p)


def philox(key: Tensor, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox-4x32-10.

    Args:
        key: int64, one element, any shape; its two halves are the key words.
        counter: four int64 tensors that broadcast together, values in [0, 2**32).

    Returns:
        Four int64 tensors of the broadcast shape, values in [0, 2**32).
    """
    c0, c1, c2, c3 = counter
    key = key.reshape(())
    k0, k1 = key & _LOW, (key >> 32) & _LOW
    for _ in range(_ROUNDS):
        # int64 products wrap, which leaves all 64 bits right; masking removes the sign bits that
        # the shift brings in and the upper halves of c1 and c3, which are never multiplied
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = ((product1 >> 32) ^ (c1 ^ k0)) & _LOW
        c2 = ((product0 >> 32) ^ (c3 ^ k1)) & _LOW
        c1, c3 = product1, product0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW, (k1 + _KEY_STEPS[1]) & _LOW
    return tuple(torch.broadcast_tensors(c0, c1 & _LOW, c2, c3 & _LOW))


def keep_mask(
    seed: Tensor,
    p: float,
    batch: range,
    heads: range,
    rows: range,
    columns: range,
) -> Tensor:
    """Which weights of a tile are kept.

    Args:
        seed: int64 [1]; the result lies on its device.
        p: probability of dropping, 0 <= p < 1.
        batch, heads, rows, columns: the tile's coordinates, step 1; heads are global
            (``head_offset`` added).

    Returns:
        bool [len(batch), len(heads), len(rows), len(columns)], True where kept.
    """

    def axis(values: range, dim: int) -> Tensor:
        line = torch.arange(values.start, values.stop, device=seed.device)
        return line.reshape([-1 if d == dim else 1 for d in range(4)])

    first_group = columns.start // 4
    groups = range(first_group, -(-columns.stop // 4))
    words = philox(seed, (axis(groups, 3), axis(rows, 2), axis(heads, 1), axis(batch, 0)))
    # compared before they are interleaved: bools are eight times smaller
    limit = 2 * threshold(p)  # (word >> 1) >= t  iff  word >= 2 t
    kept = torch.stack([word >= limit for word in words], dim=-1).flatten(-2)
    skipped = columns.start - 4 * first_group
    return kept[..., skipped : skipped + len(columns)]
