"""What looks like attention, or like a causal mask, and is not: must stay right, or stay alone.

Each: qkv ``[3, B, T, H, D]`` -> a tensor. `reason`: the code of the refusal, or "" when the site
is rewritten or left, and rewritten never as plain causal unless `found` words say what it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from spellings_base import causal_bool, finish, heads_first
from torch import Tensor

__all__ = ["DIRECT", "TRICKY", "Tricky"]


@dataclass(frozen=True)
class Tricky:
    function: Callable[..., Any]
    reason: str
    buffers: tuple[Callable[[], Tensor], ...] = ()
    parameters: tuple[Callable[[], Tensor], ...] = ()
    found: str = ""

    def __str__(self) -> str:
        return self.function.__name__


TRICKY: list[Tricky] = []
DIRECT: list[Tricky] = []  # traced without Dynamo only, in a tenth of the time


def tricky(
    reason: str = "", among: list[Tricky] = TRICKY, **made: Any
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        among.append(Tricky(function, reason, **made))
        return function

    return register


def masked(qkv: Tensor, allowed: Tensor, fill: float = float("-inf")) -> Tensor:
    q, k, v = heads_first(qkv)
    s = (q @ k.transpose(-1, -2) * 0.4).masked_fill(~allowed, fill)
    return finish(s.softmax(-1), v)


def positions(qkv: Tensor) -> tuple[Tensor, Tensor]:
    i = torch.arange(qkv.size(2))
    return i[:, None], i[None, :]


# -- masks that are nearly causal ------------------------------------------------------------------


@tricky()
def causal_but_one_entry(qkv: Tensor) -> Tensor:
    i, j = positions(qkv)
    return masked(qkv, (j <= i) & ~((i == 5) & (j == 2)))


@tricky()
def causal_plus_one_entry(qkv: Tensor) -> Tensor:
    i, j = positions(qkv)
    return masked(qkv, (j <= i) | ((i == 1) & (j == 4)))


@tricky("fully-masked-row")
def strictly_causal(qkv: Tensor) -> Tensor:
    i, j = positions(qkv)
    return masked(qkv, j < i)


@tricky("fully-masked-row")
def strictly_causal_finite(qkv: Tensor) -> Tensor:
    i, j = positions(qkv)
    return masked(qkv, j < i, -1e9)


@tricky()
def anti_causal(qkv: Tensor) -> Tensor:
    i, j = positions(qkv)
    return masked(qkv, j >= i)


@tricky()
def window_of_blocks(qkv: Tensor) -> Tensor:
    i, j = positions(qkv)
    return masked(qkv, (j <= i) & (i // 3 - j // 3 <= 1))


@tricky()
def causal_up_to_twelve(qkv: Tensor) -> Tensor:
    i, j = positions(qkv)
    return masked(qkv, (j <= i) | (i >= 12))


@tricky()
def window_that_starts_late(qkv: Tensor) -> Tensor:
    i, j = positions(qkv)
    return masked(qkv, (j <= i) & ((i < 9) | (i - j < 4)))


@tricky()
def dilated(qkv: Tensor) -> Tensor:
    i, j = positions(qkv)
    return masked(qkv, (j <= i) & ((i - j) % 2 == 0))


@tricky()
def per_head_window(qkv: Tensor) -> Tensor:
    i, j = positions(qkv)
    window = torch.tensor([2, 3, 4, 5])[:, None, None]
    return masked(qkv, (j <= i) & (i - j < window))


@tricky()
def mask_that_depends_on_the_length(qkv: Tensor) -> Tensor:
    i, j = positions(qkv)
    return masked(qkv, (j <= i) & (j >= qkv.size(2) - 9) | (j == i))


@tricky()
def flipped(qkv: Tensor) -> Tensor:
    return masked(qkv, causal_bool(qkv.size(2)).flip(0).flip(1) | causal_bool(qkv.size(2)) & False)


def _spoilt_buffer() -> Tensor:
    mask = torch.ones(16, 16, dtype=torch.bool).tril()
    mask[13, 5] = False
    return mask


@tricky(buffers=(_spoilt_buffer,))
def spoilt_buffer(qkv: Tensor, mask: Tensor) -> Tensor:
    t = qkv.size(2)
    return masked(qkv, mask[:t, :t])


@tricky()
def weak_mask(qkv: Tensor) -> Tensor:
    i, j = positions(qkv)
    q, k, v = heads_first(qkv)
    s = q @ k.transpose(-1, -2) + (j > i) * -3.0
    return finish(s.softmax(-1), v)


@tricky()
def truth_added(qkv: Tensor) -> Tensor:
    """A frequent slip: True adds 1, and forbids nothing."""
    q, k, v = heads_first(qkv)
    return finish((q @ k.mT + causal_bool(q.size(2))).softmax(-1), v)


@tricky()
def truth_of_the_data_added(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    return finish((q @ k.mT + (k[..., 0] > 0).unsqueeze(-2)).softmax(-1), v)


@tricky()
def truth_added_after_a_mask(qkv: Tensor) -> Tensor:
    i, j = positions(qkv)
    q, k, v = heads_first(qkv)
    s = (q @ k.mT).masked_fill(j > i + 2, float("-inf"))
    return finish(torch.add(j <= i, s).softmax(-1), v)


@tricky("unsupported-feature")
def weak_fill(qkv: Tensor) -> Tensor:
    i, j = positions(qkv)
    return masked(qkv, j <= i, -3.0)


@tricky("unsupported-feature")
def filled_with_zero(qkv: Tensor) -> Tensor:
    i, j = positions(qkv)
    return masked(qkv, j <= i, 0.0)


@tricky()
def not_quite_alibi(qkv: Tensor) -> Tensor:
    i, j = positions(qkv)
    q, k, v = heads_first(qkv)
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625], dtype=q.dtype)[:, None, None]
    s = q @ k.transpose(-1, -2) - slopes * (i - j).abs().clamp(max=4)
    return finish(s.masked_fill(j > i, float("-inf")).softmax(-1), v)


# -- order and axes --------------------------------------------------------------------------------


@tricky("order-of-operations")
def cap_after_mask(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    s = (q @ k.transpose(-1, -2)).masked_fill(~causal_bool(q.size(2)), -1e4)
    return finish((2.0 * torch.tanh(s / 2.0)).softmax(-1), v)


@tricky("softmax-over-another-axis")
def softmax_over_queries(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    return finish((q @ k.transpose(-1, -2)).softmax(-2), v)


@tricky("softmax-over-another-axis")
def softmax_over_heads(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    return finish((q @ k.transpose(-1, -2)).softmax(1), v)


@tricky("softmax-is-not-attention")
def linear_attention(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    return q.softmax(-1) @ (k.softmax(-2).transpose(-1, -2) @ v)


@tricky("attention-weights-used-elsewhere")
def weights_returned(qkv: Tensor) -> Any:
    q, k, v = heads_first(qkv)
    w = (q @ k.transpose(-1, -2)).softmax(-1)
    return finish(w, v), w


@tricky("attention-weights-used-elsewhere")
def scores_returned(qkv: Tensor) -> Any:
    q, k, v = heads_first(qkv)
    s = q @ k.transpose(-1, -2)
    return finish(s.softmax(-1), v), s.amax()


@tricky("softmax-is-not-attention")
def router(qkv: Tensor) -> Tensor:
    x = qkv[0].flatten(2)
    gates = (x @ torch.ones(24, 5, dtype=x.dtype).tril()).softmax(-1)
    experts = torch.stack([x * (e + 1) for e in range(5)], 2)
    return torch.einsum("bte,btec->btc", gates, experts)


@tricky("softmax-is-not-attention", parameters=(lambda: torch.rand(9, 24).double(),))
def memory_look_up(qkv: Tensor, memory: Tensor) -> Tensor:
    return (qkv[0].flatten(2) @ memory.T).softmax(-1) @ memory


@tricky()
def keys_permuted(qkv: Tensor) -> Tensor:
    """With B == 1 and H == T this has the shapes of an attention over tokens, but is none."""
    q, k, v = heads_first(qkv)
    if q.size(1) != q.size(2):
        return finish((q @ k.transpose(-1, -2)).softmax(-1), v)
    return (q @ k.permute(0, 2, 3, 1) * 0.3).softmax(-1) @ v


@tricky()
def values_transposed(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    if q.size(2) != q.size(3):
        return finish((q @ k.transpose(-1, -2)).softmax(-1), v)
    return (q @ k.transpose(-1, -2)).softmax(-1) @ v.transpose(-1, -2)


@tricky("changed-in-place")
def key_changed_in_between(qkv: Tensor) -> Tensor:
    base = qkv.clone()
    q, k, v = (base[i].transpose(1, 2) for i in range(3))
    s = q @ k.transpose(-1, -2)
    v.mul_(2.0)
    w = s.softmax(-1)
    out = w @ v
    return out + k


@tricky("changed-in-place")
def mask_written_by_the_data(qkv: Tensor) -> Tensor:
    t = qkv.size(2)
    mask = torch.zeros(t, t, dtype=torch.bool)
    mask[:, 0] = qkv[0, 0, :, 0, 0] > 0
    return masked(qkv, mask | torch.eye(t, dtype=torch.bool))


@tricky("attention-weights-used-elsewhere")
def zeros_of_a_triangle_filled(qkv: Tensor) -> Tensor:
    """A score that happens to be 0 is masked as well."""
    q, k, v = heads_first(qkv)
    s = (q @ k.transpose(-1, -2)).tril()
    return finish(s.masked_fill(s == 0, float("-inf")).softmax(-1), v)


@tricky("unsupported-feature")
def triangle_of_the_weights(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    return finish((q @ k.transpose(-1, -2)).softmax(-1).tril(), v)


@tricky("unsupported-feature")
def triangle_of_the_scores(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    return finish((q @ k.transpose(-1, -2)).tril().softmax(-1), v)


@tricky("unsupported-feature")
def weights_sharpened(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    w = (q @ k.transpose(-1, -2)).softmax(-1)
    w = w.masked_fill(~causal_bool(q.size(2)), 0.0)
    return finish(w, v)


@tricky("attention-weights-used-elsewhere")
def squared_weights(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    return finish((q @ k.transpose(-1, -2)).softmax(-1) ** 2, v)


@tricky("unsupported-feature")
def sink_kept_in_the_values(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    s = q @ k.transpose(-1, -2)
    s = torch.cat([s, torch.zeros_like(s[..., :1])], -1)
    return finish(s.softmax(-1), F.pad(v, (0, 0, 0, 1), value=0.5))


@tricky()
def maximum_over_queries_subtracted(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    s = q @ k.transpose(-1, -2)
    return finish((s - s.amax(-2, keepdim=True).detach()).softmax(-1), v)


import tricky_factors  # noqa: E402, F401
import tricky_logsum  # noqa: E402, F401
import tricky_normalised  # noqa: E402, F401
import tricky_powers  # noqa: E402, F401
import tricky_rare  # noqa: E402, F401  (adds its cases to TRICKY)
import tricky_shifts  # noqa: E402, F401
import tricky_spread  # noqa: E402, F401
import tricky_weights  # noqa: E402, F401
