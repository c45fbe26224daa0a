"""Look-alikes of the rarer spellings: near repetitions, wrong divisors, sums over other axes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from spellings_base import causal_bool, finish, heads_first, parameter
from torch import Tensor
from tricky_spellings import DIRECT, tricky

INF = float("-inf")


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = (q @ k.transpose(-1, -2)).masked_fill(~causal_bool(q.size(2)), INF)
    return finish(s.softmax(-1), v)


def exponentials(qkv: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v = heads_first(qkv)
    s = (q @ k.transpose(-1, -2)).masked_fill(~causal_bool(q.size(2)), INF)
    return torch.exp(s - s.amax(-1, keepdim=True)), v


@tricky()
def weights_summed_over_heads_by_an_einsum(qkv: Tensor) -> Tensor:
    """What the heads share is no attention of each."""
    q, k, v = heads_first(qkv)
    p = (q @ k.mT).masked_fill(~causal_bool(q.size(2)), INF).softmax(-1)
    return torch.einsum("bhij,bjd->bid", p, v[:, 0])


# -- found, but not as what they look like ---------------------------------------------------------


@tricky(found="4 heads")
def heads_in_another_order_for_values(qkv: Tensor) -> Tensor:
    """K in blocks, V in turns: no grouping of heads says both."""
    q, k, v = heads_first(qkv)
    return attention(q, k[:, [0, 0, 1, 1]], v[:, [0, 1, 0, 1]])


@tricky(found="4 heads")
def heads_mirrored(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    return attention(q, k[:, [0, 1, 1, 0]], v[:, [0, 1, 1, 0]])


@tricky(found="4 heads")
def heads_unevenly_repeated(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    k, v = (torch.cat([x[:, :1], x[:, :1], x[:, :1], x[:, 1:2]], 1) for x in (k, v))
    return attention(q, k, v)


@tricky(found="4 heads")
def heads_stacked_from_two_tensors(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    k = torch.stack([k[:, 0], v[:, 0], k[:, 1], v[:, 1]], 1)
    return attention(q, k, v)


@tricky(found="4 heads", buffers=(lambda: torch.tensor([0, 0, 1, 1]),))
def heads_chosen_by_a_buffer(qkv: Tensor, index: Tensor) -> Tensor:
    """A buffer may be written to: its present value proves nothing."""
    q, k, v = heads_first(qkv)
    return attention(q, k[:, index], v[:, index])


@tricky(found="4 heads")
def last_heads_repeated(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    return attention(q, k[:, [2, 2, 3, 3]], v[:, [2, 2, 3, 3]])


# -- left alone ------------------------------------------------------------------------------------


@tricky("unsupported-feature")
def a_part_of_more_products(qkv: Tensor) -> Tensor:
    """Every head's queries with every head's keys, of which most are dropped."""
    q, k, v = heads_first(qkv)
    s = torch.inner(q, k).diagonal(0, 0, 3).diagonal(0, 0, 2).permute(2, 3, 0, 1)
    return finish(s.softmax(-1), v)


@tricky("unsupported-feature")
def distances(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    return finish((-torch.cdist(q, k)).softmax(-1), v)


@tricky("attention-weights-used-elsewhere")
def divided_by_the_sum_and_returned(qkv: Tensor) -> tuple[Tensor, Tensor]:
    e, v = exponentials(qkv)
    total = e.sum(-1, keepdim=True)
    return (e @ v) / total, total


@tricky("attention-weights-used-elsewhere")
def product_before_the_division_used(qkv: Tensor) -> Tensor:
    e, v = exponentials(qkv)
    out = e @ v
    return out / e.sum(-1, keepdim=True) + out


@tricky("attention-weights-used-elsewhere")
def elementwise_factors_used(qkv: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v = heads_first(qkv)
    w = (q @ k.transpose(-1, -2)).softmax(-1)
    parts = w[..., None] * v[:, :, None]
    return parts.sum(3), parts.amax(3)


@tricky()
def divided_by_a_sum_over_the_queries(qkv: Tensor) -> Tensor:
    e, v = exponentials(qkv)
    return (e @ v) / e.sum(-2).unsqueeze(-1)


@tricky()
def divided_by_the_sum_of_each_keys_own_row(qkv: Tensor) -> Tensor:
    e, v = exponentials(qkv)
    return (e / e.sum(-1, keepdim=True).transpose(-1, -2)) @ v


@tricky()
def divided_by_the_sum_of_each_keys_own_row_in_another_layout(qkv: Tensor) -> Tensor:
    e, v = exponentials(qkv)
    return (e / e.sum(-1)[:, :, None, :]) @ v


@tricky()
def divided_by_another_sum(qkv: Tensor) -> Tensor:
    e, v = exponentials(qkv)
    return (e @ v) / (e * 2).sum(-1, keepdim=True)


@tricky()
def values_summed_along_the_queries(qkv: Tensor) -> Tensor:
    """With the keys in the wrong place nothing is contracted with the softmax's axis."""
    e, v = exponentials(qkv)
    w = e / e.sum(-1, keepdim=True)
    return (w[..., None] * v[:, :, :, None]).sum(2)


@tricky("unsupported-feature")
def capped_by_a_sigmoid(qkv: Tensor) -> Tensor:
    """An unknown operation between q.k and the softmax: an attention all the same."""
    q, k, v = heads_first(qkv)
    s = 4.0 * torch.sigmoid(q @ k.mT) - 2.0
    return finish(s.softmax(-1), v)


@tricky("changed-in-place")
def masked_by_an_index(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    s = (q @ k.mT) * 0.4
    s[..., 1] = -1e9
    return finish(s.softmax(-1), v)


@tricky("softmax-is-not-attention")
def scores_of_a_learned_product(qkv: Tensor) -> Tensor:
    """A router behind an activation is none."""
    x = qkv[0].flatten(2)
    w = (x @ torch.ones(24, 6, dtype=x.dtype)).sigmoid().softmax(-1)
    out: Tensor = w @ torch.ones(6, 24, dtype=x.dtype)
    return out


@tricky("unsupported-feature", parameters=(parameter(4, 4),))
def scores_of_heads_mixed(qkv: Tensor, mix: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    s = torch.einsum("bhij,hg->bgij", q @ k.mT, mix)
    return finish(s.softmax(-1), v)


@tricky("unsupported-feature", parameters=(parameter(4, 4),))
def weights_of_heads_mixed(qkv: Tensor, mix: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    w = torch.einsum("bhij,hg->bgij", (q @ k.mT).softmax(-1), mix)
    return finish(w, v)


@tricky("order-of-operations")
def masked_and_then_subtracted(qkv: Tensor) -> Tensor:
    """The clamp from below becomes one from above."""
    q, k, v = heads_first(qkv)
    s = (q @ k.mT).clamp(min=-1e9)
    return finish((q.sum(-1, keepdim=True) - s).softmax(-1), v)


@tricky("order-of-operations")
def clamped_and_then_added_with_a_negative_factor(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    s = (q @ k.mT).clamp(min=-1e9)
    return finish(torch.add(q.sum(-1, keepdim=True), s, alpha=-0.5).softmax(-1), v)


@tricky()
def mask_that_the_factor_makes_weak(qkv: Tensor) -> Tensor:
    """The factor is on the mask as well."""
    q, k, v = heads_first(qkv)
    s = q @ k.mT + torch.full((q.size(2), q.size(2)), -2e4, dtype=q.dtype).triu(1)
    return finish(torch.add(k.sum(-1)[:, :, None], s, alpha=1e-4).softmax(-1), v)


@tricky()
def values_added_to_their_product(qkv: Tensor) -> Tensor:
    """What `addmm` adds is no part of the product with the values."""
    q, k, v = (x[0, :, 0] for x in qkv.unbind(0))
    return torch.addmm(v, (q @ k.t()).softmax(-1), v)


@tricky("attention-weights-used-elsewhere", among=DIRECT)
def every_row_with_the_keys_of_every_head(qkv: Tensor) -> Tensor:
    """`inner` of tensors with heads; the scores of one head are then cut out."""
    q, k, v = (x[0, :, :2].transpose(0, 1) for x in qkv.unbind(0))
    s = torch.inner(q, k).softmax(-1)  # [Hq, T, Hk, T]
    return s[:, :, 0] @ v + s[:, :, 1].tanh() @ v


@tricky("unsupported-feature")
def scores_rectified_and_squared(qkv: Tensor) -> Tensor:
    """Two unknown operations in a row."""
    q, k, v = heads_first(qkv)
    return finish((torch.relu(q @ k.mT) ** 2).softmax(-1), v)


@tricky("changed-in-place", among=DIRECT)
def mask_changed_among_several(qkv: Tensor) -> Tensor:
    """What writes is given a list; nothing is masked."""
    q, k, v = heads_first(qkv)
    mask = (q[0, 0, :, :1] - 1e9).repeat(1, q.size(2)).triu(1)
    torch._foreach_mul_([mask], 0.0)
    return finish((q @ k.mT + mask).softmax(-1), v)


@tricky("unsupported-feature", among=DIRECT)
def windows_that_overlap(qkv: Tensor) -> Tensor:
    """Each window of 4 sees the one before it: both are axes of one overlapping view."""
    length = qkv.size(-3)
    q, k, v = (F.pad(x, (0, 0, 0, -length % 4)).unflatten(2, (-1, 4)) for x in heads_first(qkv))
    k, v = (
        F.pad(x, (0, 0, 0, 0, 1, 0)).unfold(2, 2, 1).movedim(-1, 3).flatten(3, 4) for x in (k, v)
    )
    seen = torch.arange(8) <= torch.arange(4)[:, None] + 4
    weights = (q @ (k + k.flip(-1)).mT).masked_fill(~seen, INF).softmax(-1)
    return (weights @ v).flatten(2, 3)[:, :, :length].transpose(1, 2).flatten(2)


# -- writes by indexing ----------------------------------------------------------------------------


@tricky("unsupported-feature", among=DIRECT)
def scores_written_with_a_number_of_the_data(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    s = q @ k.mT
    s[:, :, ~causal_bool(q.size(2))] = q[0, 0, 0, 0]
    return finish(s.softmax(-1), v)


@tricky("unsupported-feature", among=DIRECT)
def the_first_columns_written_before_the_mask(qkv: Tensor) -> Tensor:
    """An index that is no mask: entries 0 and 1 of the keys."""
    q, k, v = heads_first(qkv)
    s = (q @ k.mT).masked_fill(~causal_bool(q.size(2)), INF)
    s[..., [0, 1]] = 0.0
    return finish(s.softmax(-1), v)


@tricky("changed-in-place", among=DIRECT)
def a_part_of_both_changed_in_between(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    both, part = torch.zeros(2, *k.shape, dtype=k.dtype), k * 2
    both[0] = part
    part.mul_(3)
    both[1] = v
    return attention(q, both[0], both[1])
