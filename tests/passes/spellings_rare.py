"""Rarer ways to write attention: heads repeated by indexing, products and softmax by hand."""

from __future__ import annotations

import torch
from spellings_base import DIRECT, causal_bool, finish, heads_first, legal, parameter
from torch import Tensor

INF = float("-inf")


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = (q @ k.transpose(-1, -2)).masked_fill(~causal_bool(q.size(2)), INF)
    return finish(s.softmax(-1), v)


# -- repeated heads --------------------------------------------------------------------------------


@legal("causal", "2 kv heads")
def gqa_index_select(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    index = torch.arange(2).repeat_interleave(2)
    k, v = (torch.index_select(x[:, :2], 1, index) for x in (k, v))
    return causal_attention(q, k, v)


@legal("causal", "2 kv heads")
def gqa_indexed_by_a_list(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    k, v = (x[:, :2][:, [0, 0, 1, 1]] for x in (k, v))
    return causal_attention(q, k, v)


@legal("causal", "2 kv heads")
def gqa_indexed_in_turns(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    k, v = (x[:, :2][:, torch.arange(4) % 2] for x in (k, v))
    return causal_attention(q, k, v)


@legal("causal", "4 heads")
def heads_permuted_by_indexing(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    k, v = (x[:, [0, 2, 1, 3]] for x in (k, v))
    return causal_attention(q, k, v)


@legal("causal", "2 kv heads")
def gqa_cat_of_slices(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    k, v = (torch.cat([x[:, i : i + 1] for i in (0, 0, 1, 1)], 1) for x in (k[:, :2], v[:, :2]))
    return causal_attention(q, k, v)


@legal("causal", "2 kv heads")
def gqa_cat_of_everything(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    k, v = (torch.cat([x, x], dim=1) for x in (k[:, :2], v[:, :2]))
    return causal_attention(q, k, v)


@legal("causal", "2 kv heads")
def gqa_stack_of_heads(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    k, v = (torch.stack([x[:, i] for i in (0, 0, 1, 1)], dim=1) for x in (k[:, :2], v[:, :2]))
    return causal_attention(q, k, v)


@legal("causal", "2 kv heads")
def gqa_stack_of_unbound_heads(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    k, v = (torch.stack([*x.unbind(1), *x.unbind(1)], 1) for x in (k[:, :2], v[:, :2]))
    return causal_attention(q, k, v)


@legal("causal", "2 kv heads")
def gqa_stack_of_everything(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    k, v = (torch.stack([x, x], dim=2).flatten(1, 2) for x in (k[:, :2], v[:, :2]))
    return causal_attention(q, k, v)


# -- products --------------------------------------------------------------------------------------


@legal("causal", "scale 0.4")
def scores_by_elementwise_product(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    s = (q.unsqueeze(-2) * k.unsqueeze(-3)).sum(-1) * 0.4
    return finish(s.masked_fill(~causal_bool(q.size(2)), INF).softmax(-1), v)


@legal("causal")
def both_by_elementwise_products(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    s = (q[:, :, :, None] * k[:, :, None]).sum(dim=-1)
    w = s.masked_fill(~causal_bool(q.size(2)), INF).softmax(-1)
    return (w[..., None] * v[:, :, None]).sum(3).transpose(1, 2).flatten(2)


def causal_bias(like: Tensor) -> Tensor:
    return torch.full((like.size(-2), like.size(-2)), INF, dtype=like.dtype).triu(1)


@legal("causal", "1 heads", "scale 0.3")
def one_head_after_the_other_by_addmm(qkv: Tensor) -> Tensor:
    outputs = []
    for head in range(3):
        q, k, v = (x[0, :, head] for x in qkv.unbind(0))
        s = torch.addmm(causal_bias(q), q, k.t(), alpha=0.3)
        outputs.append(torch.mm(s.softmax(-1), v))
    return torch.stack(outputs)


@legal("causal", "1 heads", "dense learned bias", parameters=(parameter(16),), among=DIRECT)
def addmm_of_a_bias_for_each_key(qkv: Tensor, bias: Tensor) -> Tensor:
    q, k, v = (x[0, :, 0] for x in qkv.unbind(0))
    s = torch.addmm(bias[: q.size(0)], q, k.t(), beta=2)
    return torch.mm(s.masked_fill(~causal_bool(q.size(0)), INF).softmax(-1), v)


@legal("full", "1 heads", among=DIRECT)
def addmm_that_ignores_what_it_adds(qkv: Tensor) -> Tensor:
    q, k, v = (x[0, :, 0] for x in qkv.unbind(0))
    ignored = torch.full((q.size(0), q.size(0)), float("nan"), dtype=q.dtype)
    return torch.mm(torch.addmm(ignored, q, k.t(), beta=0).softmax(-1), v)


@legal("causal", "1 heads")
def one_head_by_inner(qkv: Tensor) -> Tensor:
    q, k, v = (x[1, :, 0] for x in qkv.unbind(0))
    return (torch.inner(q, k) + causal_bias(q)).softmax(-1) @ v


@legal("causal", "4 heads", "1 kv heads", among=DIRECT)
def shared_keys_by_inner(qkv: Tensor) -> Tensor:
    q, k, v = qkv[0, 1].transpose(0, 1), qkv[1, 1, :, 0], qkv[2, 1, :, 0]
    return (torch.inner(q, k) + causal_bias(q)).softmax(-1) @ v


@legal("causal", "1 heads")
def one_head_by_tensordot(qkv: Tensor) -> Tensor:
    q, k, v = (x[1, :, 0] for x in qkv.unbind(0))
    s = torch.tensordot(q, k, dims=([1], [1])) + causal_bias(q)
    return torch.tensordot(s.softmax(-1), v, dims=1)


@legal("causal", "4 heads", "1 kv heads", among=DIRECT)
def shared_keys_by_tensordot(qkv: Tensor) -> Tensor:
    q, k, v = qkv[0, 1], qkv[1, 1, :, 0], qkv[2, 1, :, 0]
    s = torch.tensordot(k, q, dims=([-1], [-1])).permute(2, 1, 0)  # [S, T, H] -> [H, T, S]
    return (s + causal_bias(q.transpose(0, 1))).softmax(-1) @ v


@legal("causal")
def scores_by_vecdot(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    s = torch.linalg.vecdot(q[:, :, :, None], k[:, :, None])
    return finish(s.masked_fill(~causal_bool(q.size(2)), INF).softmax(-1), v)


@legal("causal", "scale 0.4")
def added_to_the_mask_with_a_factor(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    return finish(torch.add(causal_bias(q), q @ k.mT, alpha=0.4).softmax(-1), v)


@legal("causal", "scale 0.4", among=DIRECT)
def subtracted_from_the_mask_with_a_factor(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    return finish(torch.sub(causal_bias(q), q @ k.mT, alpha=-0.4).softmax(-1), v)


@legal("causal")
def truth_added_with_a_factor(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    return finish(torch.add(q @ k.mT, ~causal_bool(q.size(2)), alpha=-1e9).softmax(-1), v)


@legal("full", "dense data bias", "scale -0.5", among=DIRECT)
def subtracted_from_the_data_with_a_factor(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    bias = q.sum(-1, keepdim=True) * k.sum(-1)[:, :, None]
    return finish(torch.sub(bias, q @ k.mT, alpha=0.5).softmax(-1), v)


@legal("full", "scale 0.25", "learned", parameters=(parameter(16),), among=DIRECT)
def added_with_a_factor_after_a_bias(qkv: Tensor, bias: Tensor) -> Tensor:
    """The factor is on the first bias as well."""
    q, k, v = heads_first(qkv)
    bias = bias[: q.size(2)]
    s = torch.add(bias, q @ k.mT * 0.5 + bias.sin(), alpha=0.5)
    return finish(s.softmax(-1), v)


# -- softmax ---------------------------------------------------------------------------------------


@legal("causal")
def divided_after_the_values(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    s = (q @ k.transpose(-1, -2)).masked_fill(~causal_bool(q.size(2)), INF)
    e = torch.exp(s - s.amax(-1, keepdim=True))
    return ((e @ v) / e.sum(-1, keepdim=True)).transpose(1, 2).flatten(2)


@legal("causal", parameters=(parameter(4, 1, 1),))
def divided_after_the_values_by_einsum(qkv: Tensor, temperature: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    s = torch.einsum("bhid,bhjd->bhij", q, k) * temperature
    s = s.masked_fill(~causal_bool(q.size(2)), -1e9)
    e = (s - s.max(-1, keepdim=True).values).exp()
    out: Tensor = torch.einsum("bhij,bhjd->bhid", e, v) / e.sum(dim=3)[..., None]
    return out


@legal("causal")
def sum_without_kept_dimension(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    s = (q @ k.transpose(-1, -2)).masked_fill(~causal_bool(q.size(2)), INF)
    e = (s - s.amax(-1).unsqueeze(-1)).exp()
    return finish(e / e.sum(-1).unsqueeze(-1), v)


@legal("causal")
def replaced_by_a_tensor_of_one_number(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    s = q @ k.transpose(-1, -2)
    return finish(torch.where(causal_bool(q.size(2)), s, -9e15 * torch.ones_like(s)).softmax(-1), v)


@legal("causal")
def subtracted_with_a_factor(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    forbidden = (~causal_bool(q.size(2))).to(q.dtype)
    return finish(torch.sub(q @ k.transpose(-1, -2), forbidden, alpha=1e9).softmax(-1), v)


@legal("causal", "dense data bias")
def squared_distances(qkv: Tensor) -> Tensor:
    """-|q - k|^2, multiplied out: the product is what is subtracted."""
    q, k, v = heads_first(qkv)
    distances = (q * q).sum(-1)[..., :, None] - 2 * (q @ k.mT) + (k * k).sum(-1)[..., None, :]
    mirrored = (k * k).sum(-1)[..., None, :] - distances
    s = mirrored.masked_fill(~causal_bool(q.size(2)), float("-inf"))
    return finish(s.softmax(-1), v)


# -- what is written into other values -------------------------------------------------------------


@legal("causal")
def result_written_into_afterwards(qkv: Tensor) -> Tensor:
    """Views of what is written into, and those of q, k and v, are made with the same sizes."""
    q, k, v = (x.reshape(*x.shape[:2], -1, x.size(-1)).transpose(1, 2) for x in qkv.unbind(0))
    s = (q @ k.transpose(-1, -2)).masked_fill(~causal_bool(q.size(2)), INF)
    out = (s.softmax(-1) @ v).clone()
    out[:, :, 0] = 0
    return out.transpose(1, 2).reshape(q.size(0), q.size(2), -1)


# -- scores that are finite ------------------------------------------------------------------------


def weights() -> Tensor:
    return torch.linspace(-1.0, 1.0, 36, dtype=torch.float64).view(6, 6).sin()


@legal("causal", "finite", among=DIRECT)
def nan_to_num_on_scores(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    s = torch.nan_to_num(q @ k.mT)
    return finish(s.masked_fill(~causal_bool(q.size(2)), INF).softmax(-1), v)


@legal("causal", "finite", among=DIRECT)
def nan_to_num_on_masked_scores(qkv: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    s = (q @ k.mT).masked_fill(~causal_bool(q.size(2)), INF)
    return finish(torch.nan_to_num(s, neginf=-1e30).softmax(-1), v)


@legal("causal", "dense data bias", parameters=(weights,), among=DIRECT)
def positions_shifted_by_a_column_of_zeros(qkv: Tensor, w: Tensor) -> Tensor:
    """As in Transformer-XL; what is added is no mask, so the finite fill forbids."""
    q, k, v = heads_first(qkv)
    b, h, t, _ = q.shape
    places = torch.arange(t - 1, -1, -1, dtype=q.dtype)[:, None] / torch.arange(1, 7)
    bd = q @ (places.sin() @ w).mT
    bd = torch.cat([bd.new_zeros(b, h, t, 1), bd], -1).view(b, h, t + 1, t)[:, :, 1:].view(bd.shape)
    return finish((q @ k.mT + bd).masked_fill(~causal_bool(t), -1e30).softmax(-1), v)


@legal("causal", "dense data bias", parameters=(weights,), among=DIRECT)
def squared_distances_under_a_finite_fill(qkv: Tensor, w: Tensor) -> Tensor:
    q, k, v = heads_first(qkv)
    q, k = (torch.nn.functional.linear(x, w) for x in (q, k))
    s = -((q**2).sum(-1)[..., None] - 2 * q @ k.mT + (k * k).sum(-1)[:, :, None])
    return finish(s.masked_fill(~causal_bool(q.size(2)), -1e30).softmax(-1), v)


@legal(among=DIRECT)
def scaled_by_a_tensor_that_a_length_is_put_into(qkv: Tensor) -> Tensor:
    """Was an error: its root has no size for an argument, only the tensor that it is taken of."""
    q, k, v = heads_first(qkv)
    s = q @ k.transpose(-1, -2) / torch.full((), q.size(2), dtype=q.dtype).sqrt()
    return finish(s.masked_fill(~causal_bool(q.size(2)), INF).softmax(-1), v)
