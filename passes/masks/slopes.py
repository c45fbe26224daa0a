"""Whether a bias is ALiBi's: ``slope_h * (j - i)``, up to a constant per row.

    bias[h, i, j] = -0.25 * (i - j)          ->  slope 0.25
    the same, stored in bfloat16             ->  slope 0.25, every entry within its rounding

A table in half precision holds rounded distances. It counts as linear if every entry is the
rounding of one line through the diagonal, and if the scores that it is added to are rounded as
coarsely themselves. In float64 models it has to be a line in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["FINE", "same_slopes", "slopes_of"]


FINE = torch.finfo(torch.float32).eps


def slopes_of(
    raw: Tensor, seen: Tensor, rounding: float, eps: float = FINE, anchored: bool = False
) -> Tensor | None:
    """The slopes, float64 ``[h]``, or None.

    Args:
        raw: the bias, float64 ``[b, h, Tq, Tk]``, any of them 1; batch entries must be equal.
        seen: where it counts, bool, broadcastable with `raw`.
        rounding: unit roundoff of the bias where it was stored and added, 0 for float32 and up.
        eps: of the dtype that decides then.
        anchored: no constant per row is left out: every row is 0 at its own key.
    """
    if raw.shape[-1] < 2 or not bool((raw == raw[:1]).all()):
        return None
    if anchored and seen.shape[-2] != seen.shape[-1]:
        return None  # which key is a row's own is another question
    table, counts = _together(raw, seen)
    exact = _linear(table, counts, eps, anchored)
    if exact is not None or rounding == 0:
        return exact
    lower, upper = _interval(table, counts, rounding)
    found = (lower + upper) / 2
    return found if bool((lower <= upper).all()) and bool((found != 0).any()) else None


def same_slopes(
    slopes: Tensor,
    raw: Tensor,
    seen: Tensor,
    rounding: float,
    eps: float = FINE,
    anchored: bool = False,
) -> bool:
    """Whether slopes found at one length are those of the bias at another."""
    own = slopes_of(raw, seen, rounding, eps, anchored)
    if own is None:
        return False
    if torch.allclose(own, slopes, rtol=8 * eps, atol=0):
        return True
    if rounding == 0:
        return False
    lower, upper = _interval(*_together(raw, seen), rounding)
    return bool(((lower <= slopes) & (slopes <= upper)).all())


def _together(raw: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Both as ``[h, Tq, Tk]``; either may have rows or heads of size 1."""
    table, counts = torch.broadcast_tensors(raw[:1], seen[:1])
    return table[0], counts[0]


def _linear(table: Tensor, counts: Tensor, eps: float, anchored: bool) -> Tensor | None:
    """Slopes of a table ``[h, Tq, Tk]`` in float32 or finer."""
    # The longest stretch of allowed neighbours is in the last row or in the first.
    row = -1 if bool((counts[0, -1, 1:] & counts[0, -1, :-1]).any()) else 0
    pairs = (counts[0, row, 1:] & counts[0, row, :-1]).nonzero().flatten()
    if len(pairs) == 0:
        return None
    first, last = int(pairs[0]), int(pairs[-1]) + 1
    slopes = (table[:, row, last] - table[:, row, first]) / (last - first)
    rest = torch.where(counts, table - slopes[:, None, None] * _distance(table), torch.nan)
    spread = rest.nan_to_num(-torch.inf).amax(-1) - rest.nan_to_num(torch.inf).amin(-1)
    if anchored:
        spread = rest.abs().nan_to_num(0.0).amax(-1)
    bound = 8 * eps * table.abs().amax((-2, -1)).clamp_min(1e-30)
    if not bool((spread.clamp_min(0) <= bound[:, None]).all()) or bool((slopes == 0).all()):
        return None
    return slopes


def _interval(table: Tensor, counts: Tensor, rounding: float) -> tuple[Tensor, Tensor]:
    """Slopes ``[h]`` for which every entry is ``slope * (j - i)`` but for its rounding."""
    distance = _distance(table)
    # In the direction of the distance, so that the slope's own sign is that of the ratio.
    ratio = table / distance
    ends = torch.stack((ratio / (1 + rounding), ratio / (1 - rounding)))
    off_diagonal = counts & (distance != 0)
    low = torch.where(off_diagonal, ends.amin(0), -torch.inf).amax((-2, -1))
    high = torch.where(off_diagonal, ends.amax(0), torch.inf).amin((-2, -1))
    on_diagonal = torch.where(counts & (distance == 0), table.abs(), 0.0).amax((-2, -1))
    empty = on_diagonal > 0
    return torch.where(empty, torch.inf, low), torch.where(empty, -torch.inf, high)


def _distance(table: Tensor) -> Tensor:
    """From each row's own column, ``[Tq, Tk]``."""
    rows, columns = table.shape[-2:]
    return torch.arange(columns, dtype=torch.float64) - torch.arange(rows)[:, None]
