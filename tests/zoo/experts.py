"""Mixtures of experts as people write them: a loop over experts, each on the tokens it got.

`EXACT` must be ported; `MIXING` are twins in which what a token gets depends on other tokens, or
on how many tokens an expert got, and must be refused.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.awkward import LAYERS, WIDTH, CausalMask, Decoder, Dense

EXPERTS, CHOSEN = 3, 2


class Routed(nn.Module):
    """Top-2 of 3; `mix` is what the styles differ in."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts = nn.ModuleList(Dense() for _ in range(EXPERTS))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``[N, C]`` to weights and experts ``[N, 2]``."""
        weights, chosen = self.gate(x).softmax(-1).topk(CHOSEN, dim=-1)
        return weights / weights.sum(-1, keepdim=True), chosen

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, x.shape[-1])
        return self.mix(flat, *self.route(flat)).view_as(x)

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        raise NotImplementedError


class MistralStyle(Routed):
    """mistral-inference: indexed in-place add."""

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        results = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            batch_idx, nth_expert = torch.where(chosen == i)
            results[batch_idx] += weights[batch_idx, nth_expert, None] * expert(x[batch_idx])
        return results


class MixtralStyle(Routed):
    """Hugging Face's first Mixtral: one-hot, permuted; slots come first."""

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        final = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
        expert_mask = F.one_hot(chosen, num_classes=EXPERTS).permute(2, 1, 0)
        for expert_idx in range(EXPERTS):
            idx, top_x = torch.where(expert_mask[expert_idx])
            current = x[None, top_x].reshape(-1, x.shape[-1])
            current = self.experts[expert_idx](current) * weights[top_x, idx, None]
            final.index_add_(0, top_x, current.to(x.dtype))
        return final


class ListStyle(Routed):
    """Hugging Face's very first Mixtral: the rows as lists, as an index."""

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        final = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
        expert_mask = F.one_hot(chosen, num_classes=EXPERTS).permute(2, 1, 0)
        for expert_idx in range(EXPERTS):
            idx, top_x = torch.where(expert_mask[expert_idx])
            rows, slots = top_x.tolist(), idx.tolist()
            if not rows or len(slots) == 0:
                continue
            current = x[None, rows].reshape(-1, x.shape[-1])
            current = self.experts[expert_idx](current) * weights[rows, slots, None]
            final.index_add_(0, top_x, current)
        return final


class HitStyle(Routed):
    """Hugging Face's later Mixtral: a loop over the experts that any token chose."""

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        final = torch.zeros_like(x)
        expert_mask = F.one_hot(chosen, num_classes=EXPERTS).permute(2, 1, 0)
        expert_hit = torch.greater(expert_mask.sum(dim=(-1, -2)), 0).nonzero()
        for expert_idx in expert_hit:
            idx, top_x = torch.where(expert_mask[expert_idx].squeeze(0))
            expert = self.experts[int(expert_idx)]
            final.index_add_(0, top_x, expert(x[top_x]) * weights[top_x, idx, None])
        return final


class StackedStyle(Routed):
    """Weights of all experts in one tensor, picked by the index that the loop yields."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList()
        self.up = nn.Parameter(torch.randn(EXPERTS, 2 * 48, WIDTH) * WIDTH**-0.5)
        self.down = nn.Parameter(torch.randn(EXPERTS, WIDTH, 48) * 48**-0.5)

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        final = torch.zeros_like(x)
        with torch.no_grad():
            mask = F.one_hot(chosen, num_classes=EXPERTS).permute(2, 1, 0)
            hit = torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero()
        for index in hit:
            index = index[0]
            if index == EXPERTS:
                continue
            slot, token = torch.where(mask[index])
            gate, up = F.linear(x[token], self.up[index]).chunk(2, dim=-1)
            y = F.linear(F.silu(gate) * up, self.down[index])
            final.index_add_(0, token, (y * weights[token, slot, None]).to(final.dtype))
        return final


class OneClassMore(StackedStyle):
    """DBRX: a class that no index can be, which the loop does not leave out itself."""

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        final = torch.zeros_like(x)
        mask = F.one_hot(chosen, num_classes=EXPERTS + 1).permute(2, 1, 0)
        for index in torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero():
            index = index[0]
            slot, token = torch.where(mask[index])
            gate, up = F.linear(x[token], self.up[index]).chunk(2, dim=-1)
            y = F.linear(F.silu(gate) * up, self.down[index])
            final.index_add_(0, token, y * weights[token, slot, None])
        return final


class CountedStyle(Routed):
    """DeepSeek's inference code: how often each expert was chosen, as a list."""

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        counts = torch.bincount(chosen.flatten(), minlength=EXPERTS).tolist()
        for i in range(EXPERTS):
            if counts[i] == 0:
                continue
            idx, top = torch.where(chosen == i)
            y[idx] += self.experts[i](x[idx]) * weights[idx, top, None]
        return y


class NumelStyle(Routed):
    """The rows are asked how many they are."""

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows, slot = (chosen == i).nonzero(as_tuple=True)
            if rows.numel() == 0:
                continue
            y.index_add_(0, rows, expert(x[rows]) * weights[rows, slot].unsqueeze(-1))
        return y


class BooleanStyle(Routed):
    """makemoe: boolean masks over [B, T] and over their flat view, gates as a sparse softmax."""

    def forward(self, x: Tensor) -> Tensor:
        logits = self.gate(x)
        top, indices = logits.topk(CHOSEN, dim=-1)
        sparse = torch.full_like(logits, float("-inf")).scatter(-1, indices, top)
        gating = F.softmax(sparse, dim=-1)
        final = torch.zeros_like(x)
        flat_x, flat_gating = x.view(-1, x.size(-1)), gating.view(-1, gating.size(-1))
        for i, expert in enumerate(self.experts):
            expert_mask = (indices == i).any(dim=-1)
            flat_mask = expert_mask.view(-1)
            if flat_mask.any():
                output = expert(flat_x[flat_mask])
                scores = flat_gating[flat_mask, i].unsqueeze(1)
                final[expert_mask] += (output * scores).squeeze(1)
        return final


class FlatBoolean(Routed):
    """One mask per expert, and the weight summed over the slots."""

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            mask = chosen == i
            token = mask.any(dim=-1)
            if token.sum() == 0:
                continue
            weight = (weights * mask).sum(dim=-1)
            y[token] += expert(x[token]) * weight[token].unsqueeze(-1)
        return y


class ViewedStyle(Routed):
    """The output keeps its shape; rows are added through a view, made anew for each expert."""

    def forward(self, x: Tensor) -> Tensor:
        flat, out = x.view(-1, WIDTH), torch.zeros_like(x)
        weights, chosen = self.route(flat)
        for i, expert in enumerate(self.experts):
            hit = (chosen == i).any(-1)
            if hit.any():
                share = (weights * (chosen == i)).sum(-1)
                out.view(-1, WIDTH)[hit] += expert(flat[hit]) * share[hit].unsqueeze(-1)
        return out


class KeptView(Routed):
    """.. or through one view for all of them."""

    def forward(self, x: Tensor) -> Tensor:
        flat, out = x.view(-1, WIDTH), torch.zeros_like(x)
        weights, chosen = self.route(flat)
        rows_out = out.view(-1, WIDTH)
        for i, expert in enumerate(self.experts):
            rows, slot = torch.where(chosen == i)
            rows_out[rows] += expert(flat[rows]) * weights[rows, slot, None]
        return out


class SwitchStyle(Routed):
    """One expert per token, its result written rather than added."""

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        probability, routes = self.gate(x).softmax(-1).max(dim=-1)
        y = x.new_zeros(x.shape)
        for i, expert in enumerate(self.experts):
            rows = torch.eq(routes, i).nonzero()[:, 0]
            y[rows] = expert(x[rows, :])
        return y * probability.unsqueeze(-1)


class BatchTokens(Routed):
    """Selected by batch and token, never flattened; a shared expert beside them."""

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.route(x)
        y = F.gelu(x)
        for i, expert in enumerate(self.experts):
            b, t, k = torch.where(chosen == i)
            if len(b) > 0:
                y[b, t] = y[b, t] + expert(x[b, t]) * weights[b, t, k, None]
        return y


class ComparedStyle(Routed):
    """litgpt: a one-hot by comparison, and a loop over its first axis."""

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        masks = (chosen.unsqueeze(-1) == torch.arange(EXPERTS)).permute(2, 0, 1)
        y = torch.zeros_like(x)
        for mask, expert in zip(masks, self.experts, strict=True):
            token_idx, expert_idx = torch.where(mask)
            y[token_idx] += weights[token_idx, expert_idx, None] * expert(x[token_idx])
        return y


class TwoRouters(MixtralStyle):
    """Each slot has a router of its own: a token may choose the same expert twice."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(WIDTH, EXPERTS, bias=False)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = torch.stack([self.gate(x), self.other(x)], 1).softmax(-1)
        return scores.max(-1).values, scores.argmax(-1)


class TwoRoutersBySlot(TwoRouters):
    """The same with slots last."""

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows, slot = torch.where(chosen == i)
            y.index_add_(0, rows, expert(x[rows]) * weights[rows, slot, None])
        return y


EXACT: dict[str, Callable[[], nn.Module]] = {
    "indexed add": MistralStyle,
    "one-hot": MixtralStyle,
    "lists of rows": ListStyle,
    "hit experts": HitStyle,
    "stacked weights": StackedStyle,
    "one class more": OneClassMore,
    "bincount": CountedStyle,
    "numel": NumelStyle,
    "boolean masks": BooleanStyle,
    "flat boolean": FlatBoolean,
    "one expert": SwitchStyle,
    "batch and token": BatchTokens,
    "compared": ComparedStyle,
    "twice the same expert": TwoRouters,
    "twice, slots last": TwoRoutersBySlot,
    "viewed": ViewedStyle,
    "kept view": KeptView,
}


# --- twins that mix tokens ---------------------------------------------------------------------


class CountScaled(NumelStyle):
    """Divided by how many tokens the expert got."""

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows, slot = torch.where(chosen == i)
            out = expert(x[rows]) / rows.shape[0]  # HERE
            y.index_add_(0, rows, out * weights[rows, slot, None])
        return y


class ListCounted(ListStyle):
    """A list of rows says how many they are."""

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows, slot = torch.where(chosen == i)
            out = expert(x[rows]) / max(len(rows.tolist()), 1)  # HERE
            y.index_add_(0, rows, out * weights[rows, slot, None])
        return y


class ListThenWritten(ListStyle):
    """The list keeps what the tensor then loses."""

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows, slot = torch.where(chosen == i)
            numbers = rows.tolist()
            rows.zero_()  # HERE
            y[numbers] += expert(x[numbers]) * weights[numbers, slot, None]
        return y


class LastSlotWins(TwoRouters):
    """Written, not added: of a token that chose the expert twice only one result is kept."""

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows, slot = torch.where(chosen == i)
            y[rows] = expert(x[rows]) * weights[rows, slot, None]  # HERE
        return y


class Centred(Routed):
    """The mean of the selected rows is taken off."""

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows, slot = torch.where(chosen == i)
            inside = x[rows]
            inside = inside - inside.mean(0, keepdim=True)  # HERE
            y.index_add_(0, rows, expert(inside) * weights[rows, slot, None])
        return y


class Normed(Routed):
    """Softmax over the selected rows."""

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows, slot = torch.where(chosen == i)
            w = weights[rows, slot, None].softmax(dim=0)  # HERE
            y.index_add_(0, rows, expert(x[rows]) * w)
        return y


class Capacity(Routed):
    """Only the first tokens that want an expert get it."""

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows, slot = torch.where(chosen == i)
            rows, slot = rows[:4], slot[:4]  # HERE
            y.index_add_(0, rows, expert(x[rows]) * weights[rows, slot, None])
        return y


class BestFirst(Routed):
    """Expert choice: an expert takes the tokens that score highest with it."""

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        scores = self.gate(x).softmax(-1)
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            best, rows = scores[:, i].topk(2, dim=0)  # HERE
            y.index_add_(0, rows, expert(x[rows]) * best[:, None])
        return y


class AmongChosen(Routed):
    """Mixture of depths: attention among the selected tokens alone."""

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        rows, _ = torch.where(chosen == 1)
        inside = x[rows][None, None]
        attend = F.scaled_dot_product_attention
        y[rows] = attend(inside, inside, inside, is_causal=True)[0, 0]  # HERE
        return y


class ComparedBySlot(Routed):
    """Each slot has its own number to compare with: a token may have both slots."""

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        token_idx, slot = torch.where(chosen == torch.arange(CHOSEN))
        y = torch.zeros_like(x)
        y[token_idx] += weights[token_idx, slot, None] * self.experts[0](x[token_idx])  # HERE
        return y


class Neighbour(Routed):
    """A selected token's result goes to another row."""

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows, slot = torch.where(chosen == i)
            out = expert(x[rows]) * weights[rows, slot, None]
            y.index_add_(0, rows.flip(0), out)  # HERE
        return y


class WritesTwice(Routed):
    """Nothing shows that a token is selected once, and the last one written wins."""

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        table = (chosen + chosen.flip(-1)) % EXPERTS  # both slots alike
        for i, expert in enumerate(self.experts):
            rows, _ = torch.where(table == i)
            y[rows] += expert(x[rows])  # HERE
        return y


class ViewShared(Routed):
    """What an expert has put into the output so far is shared out among its tokens."""

    def forward(self, x: Tensor) -> Tensor:
        flat, out = x.view(-1, WIDTH), torch.zeros_like(x)
        _, chosen = self.route(flat)
        for i, expert in enumerate(self.experts):
            hit = (chosen == i).any(-1)
            out.view(-1, WIDTH)[hit] += expert(flat[hit])
            seen = out.view(-1, WIDTH)[hit]
            out.view(-1, WIDTH)[hit] += seen.mean(0)  # HERE
        return out


class OtherWhenEmpty(Routed):
    """An expert without tokens changes every token."""

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows, slot = torch.where(chosen == i)
            if rows.numel() == 0:
                y = y + expert(x[:1])  # HERE
                continue
            y.index_add_(0, rows, expert(x[rows]) * weights[rows, slot, None])
        return y


class CountsActive(Routed):
    """Divided by the number of experts that got tokens."""

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        y, active = torch.zeros_like(x), 0
        for i, expert in enumerate(self.experts):
            mask = chosen == i
            if not mask.any():
                continue
            active += 1
            rows, slot = torch.where(mask)
            y.index_add_(0, rows, expert(x[rows]) * weights[rows, slot, None])
        return y / max(active, 1)  # HERE


class PairOfEmpty(Routed):
    """Another path when one expert got tokens and another did not."""

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows, slot = torch.where(chosen == i)
            y.index_add_(0, rows, expert(x[rows]) * weights[rows, slot, None])
        if (chosen == 2).any() and not (chosen == 0).any():
            y = y * 1.5  # HERE
        return y


class BiasForOthers(Routed):
    """Tokens that were not selected get the mean of those that were."""

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            mask = (chosen == i).any(-1)
            y[mask] += expert(x[mask])
            y[~mask] += x[mask].mean(0)  # HERE
        return y


class Busy(Routed):
    """Another path for an expert that got many tokens."""

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows, slot = torch.where(chosen == i)
            if rows.numel() > 8:  # HERE
                y = y + 1
            y.index_add_(0, rows, expert(x[rows]) * weights[rows, slot, None])
        return y


class Single(Routed):
    """Another path for an expert that got one token alone."""

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows, slot = torch.where(chosen == i)
            scale = 2.0 if len(rows) == 1 else 1.0  # HERE
            y.index_add_(0, rows, expert(x[rows]) * weights[rows, slot, None] * scale)
        return y


class BatchNormExpert(Routed):
    """Statistics over the tokens of an expert, in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(WIDTH, track_running_stats=False)

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows, slot = torch.where(chosen == i)
            normed = self.bn(x[rows])  # HERE
            y.index_add_(0, rows, expert(normed) * weights[rows, slot, None])
        return y


MIXING: dict[str, Callable[[], nn.Module]] = {
    "count": CountScaled,
    "count of a list": ListCounted,
    "rows written after the list": ListThenWritten,
    "mean of the selected": Centred,
    "softmax over the selected": Normed,
    "capacity": Capacity,
    "experts choose": BestFirst,
    "attention among the selected": AmongChosen,
    "compared by slot": ComparedBySlot,
    "another row": Neighbour,
    "written twice": WritesTwice,
    "last slot wins": LastSlotWins,
    "shared through a view": ViewShared,
    "empty changes all": OtherWhenEmpty,
    "active experts": CountsActive,
    "one empty, one not": PairOfEmpty,
    "bias for the others": BiasForOthers,
    "busy": Busy,
    "single": Single,
    "batch norm": BatchNormExpert,
}


def decoder(
    mlp: Callable[[], nn.Module],
    layers: int = LAYERS,
    mask: Callable[[], nn.Module] = CausalMask,
) -> nn.Module:
    """A four-layer decoder with these experts in the first `layers` blocks, dense ones after."""
    made = iter([mlp] * layers + [Dense] * (LAYERS - layers))
    return Decoder(mlp=lambda: next(made)(), mask=mask)


def _mixed(*styles: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        made = iter([EXACT[style] for style in styles])
        return Decoder(mlp=lambda: next(made)())

    return build


# Every style once or twice, four of them to a model: porting and engines take the time.
MODELS: dict[str, Callable[[], nn.Module]] = {
    "indices": _mixed("indexed add", "one-hot", "hit experts", "stacked weights"),
    "masks": _mixed("boolean masks", "flat boolean", "one expert", "batch and token"),
    "counts": _mixed("bincount", "numel", "compared", "lists of rows"),
    "views": _mixed("viewed", "kept view", "viewed", "kept view"),
}
