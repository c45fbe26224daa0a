"""The numbers of one attention call, shared by every implementation of `fxport::attention`."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["AttentionParams"]


@dataclass(frozen=True)
class AttentionParams:
    """Everything about an attention call that is not a tensor.

    For row ``i`` of q (absolute position ``a = i + q_offset``) and column ``j`` of k, per head h::

        s = scale * <q_i, k_j>
        s = softcap * tanh(s / softcap)          if softcap > 0
        s = s + bias[.., i, j] + slopes[h] * (j - a)
        allowed  iff  (not causal or j <= a)
                  and (window_left  < 0 or j >= a - window_left)
                  and (window_right < 0 or j <= a + window_right)
                  and segment(i) == segment(j)   (packed sequences)
                and (chunk == 0 or i // chunk == j // chunk, counted from the segment's start)
        out_i = sum_j dropout(p_ij) v_j,  p = softmax over allowed j, with exp(sinks[h]) added
                to the denominator when sinks are given

    A row with no allowed column gives zeros, and lse = -inf (with sinks: lse = sinks[h]).
    Softmax runs in float32 (float64 for float64 inputs), whatever the inputs' dtype.

    Attributes:
        scale: factor on q.k.
        causal: forbid j > a.
        window_left, window_right: how far back / ahead a row sees; -1 means without limit.
        softcap: 0 means none.
        dropout_p: probability of dropping a weight; 0 means none.
        q_offset: absolute position of q's first row (Tk - Tq for bottom-right alignment).
        head_offset: global index of this rank's first query head; only dropout's random numbers
            depend on it, so that sharding does not change them.
        chunk: how many positions see only each other; 0: no limit. With one, q and k are of one
            length, and there is neither a bias nor an offset.
    """

    scale: float
    causal: bool = False
    window_left: int = -1
    window_right: int = -1
    softcap: float = 0.0
    dropout_p: float = 0.0
    q_offset: int = 0
    head_offset: int = 0
    chunk: int = 0
