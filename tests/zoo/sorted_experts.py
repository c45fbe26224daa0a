"""Mixtures of experts that sort tokens by their expert, as people write them.

`EXACT` must be ported; `MIXING` are twins in which a token gets what depends on others, and must
be refused.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.awkward import Decoder
from tests.zoo.experts import CHOSEN, EXPERTS, WIDTH, Routed


class Joined(Routed):
    """DeepSeek's remote code: runs of the sorted rows, joined, put back by the order."""

    def runs(self, counts: list[int]) -> list[tuple[int, int]]:
        return list(enumerate(counts))

    def change(self, rows: Tensor) -> Tensor:
        return rows

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        counts = chosen.new_zeros((chosen.shape[0], len(self.experts)))
        counts.scatter_(1, chosen, 1)
        per_expert = counts.sum(dim=0)
        order = chosen.view(-1).argsort()
        rows = self.change(x[order // chosen.shape[1]])
        outputs, start = [], 0
        for i, count in self.runs(per_expert.cpu().numpy()):
            end = start + count
            if count == 0:
                continue
            outputs.append(self.experts[i](rows[start:end]))
            start = end
        return self.back(self.join(outputs), order, weights, chosen)

    def join(self, outputs: list[Tensor]) -> Tensor:
        return torch.cat(outputs, dim=0)

    def back(self, outs: Tensor, order: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        new = torch.empty_like(outs)
        new[order] = outs
        by_slot = new.view(*chosen.shape, -1).type(weights.dtype)
        return by_slot.mul_(weights.unsqueeze(dim=-1)).sum(dim=1).type(new.dtype)


class NextExpert(Joined):
    """The run of each expert goes through another one: odd, but each token on its own."""

    def runs(self, counts: list[int]) -> list[tuple[int, int]]:
        return [((i + 1) % EXPERTS, n) for i, n in enumerate(counts)]


class Scattered(Routed):
    """minimind: ends of runs, the result added to the tokens expert by expert."""

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        flat, gates = chosen.view(-1), weights.view(-1, 1)
        y = torch.zeros_like(x)
        order = flat.argsort()
        ends = flat.bincount().cpu().numpy().cumsum(0)
        tokens = order // CHOSEN
        for i, end in enumerate(ends):
            start = 0 if i == 0 else ends[i - 1]
            if start == end:
                continue
            token = tokens[start:end]
            out = self.experts[i](x[token]).to(y.dtype)
            out.mul_(gates[order[start:end]])
            y.scatter_add_(0, token.view(-1, 1).repeat(1, x.shape[-1]), out)
        return y


class Grouped(Routed):
    """torchtitan: counts by histc, weighted before the experts, split, added back at once."""

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        counts = torch.histc(chosen.view(-1).float(), bins=EXPERTS, min=0, max=EXPERTS)
        order = torch.argsort(chosen.view(-1), stable=True)
        index = (order // CHOSEN).reshape(-1, 1).expand(-1, WIDTH)
        rows = torch.gather(x, dim=0, index=index)
        rows = (rows.float() * weights.view(-1)[order].reshape(-1, 1)).to(x.dtype)
        sizes = counts.to(torch.int64).tolist()
        padding = rows.shape[0] - sum(sizes)
        parts = torch.split(rows[: sum(sizes)], split_size_or_sections=sizes, dim=0)
        out = torch.cat([self.experts[i](part) for i, part in enumerate(parts)], dim=0)
        out = torch.vstack((out, out.new_zeros((padding, out.shape[-1]))))
        return F.gelu(x).scatter_add(dim=0, index=index, src=out)


class Rolled(Joined):
    """A row looks at the one before it in the order."""

    def change(self, rows: Tensor) -> Tensor:
        return rows + rows.roll(1, 0)


class FirstDoubled(Joined):
    """Who comes first in the order counts twice, written through a view."""

    def change(self, rows: Tensor) -> Tensor:
        rows[:1].mul_(2)
        return rows


class Backwards(Joined):
    """The runs are joined from the last to the first."""

    def join(self, outputs: list[Tensor]) -> Tensor:
        return torch.cat(outputs[::-1], dim=0)


class OthersWeights(Joined):
    """Sorted rows are weighted by what is not sorted."""

    def back(self, outs: Tensor, order: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        new = torch.empty_like(outs)
        new[order] = outs * weights.view(-1, 1)
        return new.view(*chosen.shape, -1).sum(dim=1)


class ByCount(Joined):
    """What an expert gives is divided by how many tokens it has."""

    def runs(self, counts: list[int]) -> list[tuple[int, int]]:
        self.most = max(int(n) for n in counts)
        return list(enumerate(counts))


class RowsOfOthers(Joined):
    """The rows are put back where the order does not say."""

    def back(self, outs: Tensor, order: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        return super().back(outs, order.flip(0), weights, chosen)


EXACT: dict[str, Callable[[], nn.Module]] = {
    "joined": Joined,
    "another expert": NextExpert,
    "scattered": Scattered,
    "grouped": Grouped,
}
MIXING: dict[str, Callable[[], nn.Module]] = {
    "rolled": Rolled,
    "first doubled": FirstDoubled,
    "backwards": Backwards,
    "others' weights": OthersWeights,
    "by count": ByCount,
    "rows of others": RowsOfOthers,
}


def sorted_experts() -> nn.Module:
    """A decoder with one of each."""
    made = iter(EXACT.values())
    return Decoder(mlp=lambda: next(made)())
