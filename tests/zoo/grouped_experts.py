"""Mixtures of experts that compute on all sorted tokens at once: with weights looked up for each
row, or in one grouped product.

The first ones must be ported; `MIXING` are twins that give a token what depends on others, and
must be refused.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.experts import CHOSEN, EXPERTS, WIDTH, Routed

INNER = 48


class Sorted(Routed):
    """Weights of all experts in one tensor; `gives` computes on the sorted rows."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList()
        self.up = nn.Parameter(torch.randn(EXPERTS, WIDTH, INNER) * WIDTH**-0.5)
        self.down = nn.Parameter(torch.randn(EXPERTS, INNER, WIDTH) * INNER**-0.5)
        self.bias = nn.Parameter(torch.randn(EXPERTS, INNER))

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        owner, order = torch.sort(chosen.flatten())
        token = order // CHOSEN
        y = self.gives(x[token], owner, chosen)
        y = y * weights.flatten()[order].unsqueeze(-1)
        return torch.zeros_like(x).index_add_(0, token, y)

    def gives(self, rows: Tensor, owner: Tensor, chosen: Tensor) -> Tensor:
        raise NotImplementedError


class Owners(Sorted):
    """ScatterMoE in plain torch: the expert of each row out of the counts."""

    def counts(self, owner: Tensor, chosen: Tensor) -> Tensor:
        return owner.bincount(minlength=EXPERTS)

    def numbers(self) -> Tensor:
        return torch.arange(EXPERTS)

    def gives(self, rows: Tensor, owner: Tensor, chosen: Tensor) -> Tensor:
        owner = torch.repeat_interleave(self.numbers(), self.counts(owner, chosen))
        h = F.silu(torch.bmm(rows.unsqueeze(1), self.up[owner]))
        return self.after(torch.bmm(h, self.down[owner]).squeeze(1))

    def after(self, rows: Tensor) -> Tensor:
        return rows


class LookedUp(Sorted):
    """By what the sort gives itself; more that is done to each row on its own."""

    def gives(self, rows: Tensor, owner: Tensor, chosen: Tensor) -> Tensor:
        h = torch.einsum("si,sio->so", rows, self.up.index_select(0, owner))
        h = F.layer_norm(h + F.embedding(owner, self.bias), (INNER,)).view(-1, 4, INNER // 4)
        h = (h - h.mean(-1, keepdim=True)).flatten(1) / 2
        return (h[:, None] @ self.down[owner])[:, 0]


class Grouped(Sorted):
    """torchtitan: grouped products, and where each group ends."""

    def ends(self, chosen: Tensor) -> Tensor:
        counts = torch.histc(chosen.view(-1).float(), bins=EXPERTS, min=0, max=EXPERTS)
        return torch.cumsum(counts, dim=0, dtype=torch.int32)

    def rows(self, rows: Tensor) -> Tensor:
        return rows

    def gives(self, rows: Tensor, owner: Tensor, chosen: Tensor) -> Tensor:
        rows, ends = self.rows(rows), self.ends(chosen)
        h = F.silu(torch._grouped_mm(rows, self.up, offs=ends))
        return torch._grouped_mm(h, self.down, offs=ends)


class Inverse(Sorted):
    """Put back through the inverse of the order, which is written."""

    def inverse(self, order: Tensor) -> Tensor:
        back = torch.empty_like(order)
        back[order] = torch.arange(order.numel())
        return back

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        owner, order = chosen.flatten().sort(stable=True)
        ends = owner.bincount(minlength=EXPERTS).cumsum(0).int()
        h = F.grouped_mm(x[order // CHOSEN], self.up, offs=ends)
        y = F.grouped_mm(h.relu(), self.down, offs=ends)[self.inverse(order)]
        return (y.view(-1, CHOSEN, WIDTH) * weights.unsqueeze(-1)).sum(1)


class InverseScattered(Inverse):
    def inverse(self, order: Tensor) -> Tensor:
        return torch.zeros_like(order).scatter(0, order, torch.arange(order.numel()))


class Starts(Routed):
    """Where runs begin and end, as tensors."""

    def bounds(self, counts: Tensor) -> tuple[Tensor, Tensor]:
        ends = counts.cumsum(0)
        return torch.cat([ends.new_zeros(1), ends[:-1]]), ends

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        owner, order = chosen.view(-1).sort()
        starts, ends = self.bounds(torch.bincount(owner, minlength=EXPERTS))
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            start, end = starts[i].item(), ends[i].item()
            if start == end:
                continue
            slots = order[start:end]
            token = slots // CHOSEN
            y.index_add_(0, token, expert(x[token]) * weights.view(-1)[slots].unsqueeze(-1))
        return y


class StartsByDifference(Starts):
    def bounds(self, counts: Tensor) -> tuple[Tensor, Tensor]:
        ends = counts.cumsum(0)
        return ends - counts, ends


class StartsPadded(Starts):
    def bounds(self, counts: Tensor) -> tuple[Tensor, Tensor]:
        ends = F.pad(counts.cumsum(0), (1, 0))
        return ends[:-1], ends[1:]


# --- twins: the line that must be named is marked ------------------------------------------------


class OwnersOfOthers(Owners):
    """Counts of another choice."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.worst = (-self.gate(x)).topk(CHOSEN, dim=-1)[1].view(-1)
        return super().route(x)

    def counts(self, owner: Tensor, chosen: Tensor) -> Tensor:
        return self.worst.bincount(minlength=EXPERTS)


class OwnersTurned(Owners):
    """The first run is of the last expert."""

    def numbers(self) -> Tensor:
        return torch.arange(EXPERTS).flip(0)


class OwnersWithoutOne(Owners):
    """Nobody has the first expert: the runs are shifted."""

    def counts(self, owner: Tensor, chosen: Tensor) -> Tensor:
        counts = owner.bincount(minlength=EXPERTS)
        return torch.cat([counts[1:], counts[:1]])


class Centred(Owners):
    """The mean of all rows is taken off."""

    def after(self, rows: Tensor) -> Tensor:
        return rows - rows.mean(0)


class AllRows(Owners):
    """Rows are compared with all others."""

    def after(self, rows: Tensor) -> Tensor:
        return (rows @ rows.t()).softmax(-1) @ rows


class OthersWeights(Owners):
    """Weights are looked up in the order of the slots, and rows are sorted."""

    def gives(self, rows: Tensor, owner: Tensor, chosen: Tensor) -> Tensor:
        h = torch.bmm(rows[:, None], self.up[chosen.flatten()])
        return (h.relu() @ self.down[owner]).squeeze(1)


class OthersWeightsInLetters(Owners):
    def gives(self, rows: Tensor, owner: Tensor, chosen: Tensor) -> Tensor:
        h = torch.einsum("si,sio->so", rows, self.up[chosen.flatten()])
        return torch.einsum("si,sio->so", h.relu(), self.down[owner])


class Pairs(Owners):
    """Two neighbours in the order are one row."""

    def after(self, rows: Tensor) -> Tensor:
        return rows.view(-1, CHOSEN, WIDTH).flip(1).reshape(-1, WIDTH)


class Unsorted(Owners):
    """Sorted rows, and what is not sorted."""

    def gives(self, rows: Tensor, owner: Tensor, chosen: Tensor) -> Tensor:
        return super().gives(rows * chosen.view(-1, 1), owner, chosen)


class First(Owners):
    """One row counts for all."""

    def after(self, rows: Tensor) -> Tensor:
        return rows + rows[:1]


class OthersEnds(Grouped):
    """The groups are those of another choice."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.worst = (-self.gate(x)).topk(CHOSEN, dim=-1)[1]
        return super().route(x)

    def ends(self, chosen: Tensor) -> Tensor:
        return super().ends(self.worst)

    def gives(self, rows: Tensor, owner: Tensor, chosen: Tensor) -> Tensor:
        ends = self.ends(chosen)
        ends = torch.cat([ends[:-1], super().ends(chosen)[-1:]])
        h = F.silu(torch._grouped_mm(rows, self.up, offs=ends))  # refused
        return torch._grouped_mm(h, self.down, offs=ends)


class EndsEarlier(Grouped):
    """Half of each group goes to the next expert."""

    def ends(self, chosen: Tensor) -> Tensor:
        ends = super().ends(chosen)
        return torch.cat([ends[:-1] // 2, ends[-1:]])

    def gives(self, rows: Tensor, owner: Tensor, chosen: Tensor) -> Tensor:
        ends = self.ends(chosen)
        h = F.silu(torch._grouped_mm(rows, self.up, offs=ends))  # refused
        return torch._grouped_mm(h, self.down, offs=ends)


class EndsOfNext(Grouped):
    """The first expert takes the second one's group, too."""

    def ends(self, chosen: Tensor) -> Tensor:
        ends = super().ends(chosen)
        return torch.cat([ends[1:], ends[-1:]])

    def gives(self, rows: Tensor, owner: Tensor, chosen: Tensor) -> Tensor:
        ends = self.ends(chosen)
        h = F.silu(torch._grouped_mm(rows, self.up, offs=ends))  # refused
        return torch._grouped_mm(h, self.down, offs=ends)


class Rolled(Grouped):
    """Each row is the one before it in the order."""

    def rows(self, rows: Tensor) -> Tensor:
        return rows.roll(1, 0)  # refused


class WrittenAgain(Inverse):
    """The first slot takes the row of another."""

    def inverse(self, order: Tensor) -> Tensor:
        back = super().inverse(order)
        back[:1] = 0  # refused
        return back


class InverseTurned(Inverse):
    """Slots take rows from the end."""

    def inverse(self, order: Tensor) -> Tensor:
        back = torch.empty_like(order)
        back[order] = torch.arange(order.numel()).flip(0)
        return back


class StartsLater(Starts):
    """The first row of each run is left out."""

    def bounds(self, counts: Tensor) -> tuple[Tensor, Tensor]:
        starts, ends = super().bounds(counts)
        return starts.add(1).minimum(ends), ends


class StartsOfNext(Starts):
    """Runs begin where the one after the next ends."""

    def bounds(self, counts: Tensor) -> tuple[Tensor, Tensor]:
        ends = counts.cumsum(0)
        return torch.cat([ends[1:], ends[-1:]]), ends


MIXING: dict[str, type[Routed]] = {
    "owners of others": OwnersOfOthers,
    "owners turned": OwnersTurned,
    "owners without one": OwnersWithoutOne,
    "centred": Centred,
    "all rows": AllRows,
    "others' weights": OthersWeights,
    "others' weights in letters": OthersWeightsInLetters,
    "pairs": Pairs,
    "unsorted": Unsorted,
    "first": First,
    "others' ends": OthersEnds,
    "ends earlier": EndsEarlier,
    "ends of next": EndsOfNext,
    "rolled": Rolled,
    "written again": WrittenAgain,
    "inverse turned": InverseTurned,
    "starts later": StartsLater,
    "starts of next": StartsOfNext,
}
# Those whose refusal names the line that is marked; the others are refused where tokens are
# sorted, or where numbers are taken.
MARKED = ("others' ends", "ends earlier", "ends of next", "rolled", "written again")
