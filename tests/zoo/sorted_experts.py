"""Mixtures of experts that sort tokens by their expert, as people write them.

`EXACT` must be ported; `MIXING` are twins in which a token gets what depends on others, and must
be refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.awkward import Decoder
from tests.zoo.experts import CHOSEN, EXPERTS, WIDTH, Routed, decoder


class Joined(Routed):
    """DeepSeek's remote code: runs of the sorted rows, joined, put back by the order."""

    def count(self, chosen: Tensor) -> Tensor:
        counts = chosen.new_zeros((chosen.shape[0], len(self.experts)))
        counts.scatter_(1, chosen, 1)
        return counts.sum(dim=0)

    def numbers(self, counts: Tensor) -> Any:
        return counts.cpu().numpy()

    def sort(self, chosen: Tensor) -> Tensor:
        return chosen.view(-1).argsort()

    def change(self, rows: Tensor) -> Tensor:
        return rows

    def run(self, i: int, rows: Tensor, start: int, end: int) -> Tensor:
        return self.experts[i](rows[start:end])

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        order = self.sort(chosen)
        per_expert = self.count(chosen)
        rows = self.change(x[order // chosen.shape[1]])
        outputs, start = [], 0
        for i, count in enumerate(self.numbers(per_expert)):
            end = start + count
            if count == 0:
                continue
            outputs.append(self.run(i, rows, start, end))
            start = end
        return self.back(self.join(outputs, rows), order, weights, chosen)

    def join(self, outputs: list[Tensor], rows: Tensor) -> Tensor:
        return torch.cat(outputs, dim=0)

    def back(self, outs: Tensor, order: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        new = torch.empty_like(outs)
        new[order] = outs
        by_slot = new.view(*chosen.shape, -1).type(weights.dtype)
        return by_slot.mul_(weights.unsqueeze(dim=-1)).sum(dim=1).type(new.dtype)


class Inverted(Joined):
    """A stable sort; taken back by the inverse of the order. The run of each expert goes through
    another one: odd, but each token on its own."""

    def sort(self, chosen: Tensor) -> Tensor:
        return chosen.view(-1).sort(stable=True)[1]

    def run(self, i: int, rows: Tensor, start: int, end: int) -> Tensor:
        return self.experts[(i + 1) % EXPERTS](rows[start:end])

    def back(self, outs: Tensor, order: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        by_slot = outs[order.argsort()].view(*chosen.shape, -1)
        return (by_slot * weights[..., None]).sum(dim=1)


class Scattered(Routed):
    """minimind: ends of runs, the result added to the tokens expert by expert."""

    def cut(self, tokens: Tensor, start: int, end: int) -> Tensor:
        return tokens[start:end]

    def out(self, i: int, x: Tensor, gates: Tensor, token: Tensor, slots: Tensor) -> Tensor:
        out = self.experts[i](x[token]).to(x.dtype)
        return out.mul_(gates[slots])

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
            token = self.cut(tokens, start, end)
            out = self.out(i, x, gates, token, self.cut(order, start, end))
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


class Numbered(Routed):
    """The token of every slot as numbers, sorted; the runs added back expert by expert."""

    def numbers(self, tokens: int, chosen: Tensor) -> Tensor:
        return torch.arange(tokens).repeat_interleave(CHOSEN)

    def cut(self, rows: Tensor, start: int, count: int) -> Tensor:
        return rows[start : start + count]

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        flat = chosen.reshape(-1)
        order = torch.argsort(flat, stable=True)
        counts = torch.bincount(flat, minlength=EXPERTS).tolist()
        tokens = self.numbers(x.shape[0], chosen)[order]
        gates = weights.reshape(-1)[order]
        y, start = torch.zeros_like(x), 0
        for expert, count in zip(self.experts, counts, strict=True):
            if count > 0:
                token = self.cut(tokens, start, count)
                gate = self.cut(gates, start, count).unsqueeze(-1)
                y.index_add_(0, token, gate * expert(x.index_select(0, token)))
            start += count
        return y


class NumberedWide(Numbered):
    """A column beside itself, and `narrow`."""

    def numbers(self, tokens: int, chosen: Tensor) -> Tensor:
        return torch.arange(tokens)[:, None].expand(-1, CHOSEN).reshape(-1)

    def cut(self, rows: Tensor, start: int, count: int) -> Tensor:
        return rows.narrow(0, start, count)


class NumberedAs(NumberedWide):
    """The same by the shape of what was chosen."""

    def numbers(self, tokens: int, chosen: Tensor) -> Tensor:
        return torch.arange(tokens).view(-1, 1).expand_as(chosen).flatten()

    def cut(self, rows: Tensor, start: int, count: int) -> Tensor:
        return torch.narrow(rows, dim=0, start=start, length=count)


class NumberedBySlot(Numbered):
    """The number of the slot, divided."""

    def numbers(self, tokens: int, chosen: Tensor) -> Tensor:
        return torch.arange(tokens * CHOSEN) // CHOSEN


class Parallel(Joined):
    """JetMoE: weights of all experts in one tensor; what all of them gave is cut into halves,
    gated, and given to the next ones."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList()
        self.up = nn.Parameter(torch.randn(EXPERTS, 2 * 48, WIDTH) * WIDTH**-0.5)
        self.down = nn.Parameter(torch.randn(EXPERTS, WIDTH, 48) * 48**-0.5)

    def by_expert(self, rows: Tensor, counts: list[int], weight: Tensor) -> Tensor:
        parts = rows.split(counts, dim=0)
        return torch.cat([F.linear(parts[i], weight[i]) for i in range(EXPERTS)], dim=0)

    def halves(self, rows: Tensor) -> Tensor:
        value, gate = rows.chunk(2, dim=-1)
        return F.silu(value) * gate

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        zeros = torch.zeros(x.shape[0], EXPERTS, dtype=x.dtype)
        _, order = chosen.flatten().sort(0)
        counts = zeros.scatter(1, chosen, 1).long().sum(0).tolist()
        token = order.div(CHOSEN, rounding_mode="trunc")
        out = self.by_expert(
            self.halves(self.by_expert(x[token], counts, self.up)), counts, self.down
        )
        out = out * weights.flatten()[order][:, None]
        return torch.zeros_like(x).index_add(0, token, out)


# --- twins: the line that must be named is marked ------------------------------------------------


class CountedFirst(Routed):
    """JetMoE: how many rows each expert gets is a list before anything is sorted."""

    def sizes(self, chosen: Tensor, gates: Tensor) -> list[int]:
        ones = torch.zeros([gates.shape[0], EXPERTS], dtype=gates.dtype).scatter(1, chosen, 1)
        sizes: list[int] = ones.long().sum(0).tolist()
        return sizes

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        sizes = self.sizes(chosen, weights)
        _, order = chosen.flatten().sort(0)
        token = order.div(CHOSEN, rounding_mode="trunc")
        parts = x[token].split(sizes, dim=0)
        out = torch.cat([self.experts[i](parts[i]) for i in range(EXPERTS)], dim=0)
        out = out * weights.flatten()[order][:, None]
        return torch.zeros_like(x).index_add(0, token, out)


class BincountFirst(Scattered):
    """The same by `bincount`, and a loop that leaves out experts without rows."""

    def sizes(self, chosen: Tensor) -> list[int]:
        sizes: list[int] = torch.bincount(chosen.flatten(), minlength=EXPERTS).tolist()
        return sizes

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        sizes, start = self.sizes(chosen), 0
        order, y = chosen.flatten().argsort(), torch.zeros_like(x)
        tokens, gates = order // CHOSEN, weights.view(-1, 1)
        for i, size in enumerate(sizes):
            if size > 0:
                token, slots = tokens[start : start + size], order[start : start + size]
                y.index_add_(0, token, self.out(i, x, gates, token, slots))
            start += size
        return y


class OthersCountedFirst(CountedFirst):
    """The runs are as long as those of the worst choice, counted before anything is sorted."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.worst = (-self.gate(x)).topk(CHOSEN, dim=-1)[1]
        return super().route(x)

    def sizes(self, chosen: Tensor, gates: Tensor) -> list[int]:
        return super().sizes(self.worst, gates)


class CountsSwapped(CountedFirst):
    """The first two experts get each other's runs."""

    def sizes(self, chosen: Tensor, gates: Tensor) -> list[int]:
        one, two, *rest = super().sizes(chosen, gates)
        return [two, one, *rest]


class HalfCounted(CountedFirst):
    """Only what comes first is counted, so the runs are others."""

    def sizes(self, chosen: Tensor, gates: Tensor) -> list[int]:
        one, *rest = super().sizes(chosen[:, :1], gates)
        return [one + chosen.numel() - chosen.shape[0], *rest]


class Rolled(Joined):
    """A row looks at the one before it in the order."""

    def change(self, rows: Tensor) -> Tensor:
        return rows + rows.roll(1, 0)  # refused


class OverRows(Parallel):
    """The rows share one softmax."""

    def halves(self, rows: Tensor) -> Tensor:
        return rows.softmax(0)[:, :48]  # refused


class FirstDoubled(Joined):
    """Who comes first in the order counts twice, written through a view."""

    def change(self, rows: Tensor) -> Tensor:
        rows[:1].mul_(2)  # refused
        return rows


class WrittenLater(Joined):
    """Sorted rows change after a run of them was cut, which is the same memory."""

    def run(self, i: int, rows: Tensor, start: int, end: int) -> Tensor:
        part = rows[start:end]
        rows.data.mul_(2)  # refused
        return self.experts[i](part)


class InPlace(Joined):
    """Experts write into the sorted rows: what is joined is not read."""

    def run(self, i: int, rows: Tensor, start: int, end: int) -> Tensor:
        rows[start:end].copy_(self.experts[i](rows[start:end]))  # refused
        return rows[start:end]

    def join(self, outputs: list[Tensor], rows: Tensor) -> Tensor:
        return rows


class Backwards(Joined):
    """The runs are joined from the last to the first."""

    def join(self, outputs: list[Tensor], rows: Tensor) -> Tensor:
        return torch.cat(outputs[::-1], dim=0)  # refused


class OthersWeights(Joined):
    """Sorted rows are weighted by what is not sorted."""

    def back(self, outs: Tensor, order: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        new = torch.empty_like(outs)
        new[order] = outs * weights.view(-1, 1)
        return new.view(*chosen.shape, -1).sum(dim=1)


class OtherOrdersWeights(Joined):
    """Sorted rows are weighted by what is sorted otherwise."""

    def back(self, outs: Tensor, order: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        other = (EXPERTS - 1 - chosen).view(-1).argsort()
        new = torch.empty_like(outs)
        new[order] = outs * weights.view(-1)[other].view(-1, 1)
        return new.view(*chosen.shape, -1).sum(dim=1)


class RowsOfOthers(Joined):
    """The rows are put back where the order does not say."""

    def back(self, outs: Tensor, order: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        return super().back(outs, order.flip(0), weights, chosen)


class NotInverted(Joined):
    """The rows are taken by the order again, not by its inverse."""

    def back(self, outs: Tensor, order: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        by_slot = outs[order].view(*chosen.shape, -1)
        return (by_slot * weights.unsqueeze(dim=-1)).sum(dim=1)


class Descending(Joined):
    """The last expert comes first, but runs are counted from the first."""

    def sort(self, chosen: Tensor) -> Tensor:
        return torch.sort(chosen.view(-1), -1, True)[1]


class Narrowed(Joined):
    """The numbers of the slots do not fit: those from 128 on are others."""

    def sort(self, chosen: Tensor) -> Tensor:
        return chosen.view(-1).argsort().to(torch.int8).long() % chosen.numel()  # refused


class WrittenBefore(Joined):
    """The first token's experts are others, written through a view and copied."""

    def sort(self, chosen: Tensor) -> Tensor:
        chosen[:1].add_(1).remainder_(EXPERTS)  # refused
        return chosen.clone().view(-1).argsort()


class WrittenAfter(Joined):
    """The first token's experts change after tokens were sorted and before they are counted."""

    def sort(self, chosen: Tensor) -> Tensor:
        order = chosen.view(-1).argsort()
        chosen[:1].add_(1).remainder_(EXPERTS)  # refused
        return order


class ByCount(Joined):
    """What an expert gives is divided by how many tokens it has."""

    def run(self, i: int, rows: Tensor, start: int, end: int) -> Tensor:
        return self.experts[i](rows[start:end]) / int(end - start)  # refused


class Capacity(Joined):
    """An expert takes at most four slots; the others are shifted to the next."""

    def numbers(self, counts: Tensor) -> Any:
        return [min(n, 4) for n in counts.cpu().numpy()]  # refused

    def back(self, outs: Tensor, order: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        all_slots = torch.cat([outs, outs.new_zeros(order.numel() - len(outs), WIDTH)])
        return super().back(all_slots, order, weights, chosen)


class Clamped(Capacity):
    """The same for the first expert, in the tensor."""

    def numbers(self, counts: Tensor) -> Any:
        counts[:1].clamp_(max=4)  # refused
        return counts.cpu().numpy()


class NothingCounted(Joined):
    """All counts are zero: the experts are not run."""

    def count(self, chosen: Tensor) -> Tensor:
        counts = torch.zeros(chosen.shape[0], EXPERTS, dtype=torch.long)
        return counts.scatter_(1, chosen, 1, reduce="multiply").sum(dim=0)

    def numbers(self, counts: Tensor) -> Any:
        return counts.cpu().numpy()  # refused

    def join(self, outputs: list[Tensor], rows: Tensor) -> Tensor:
        return super().join(outputs, rows) if outputs else rows


class OthersCounts(Joined):
    """The runs are as long as those of another choice, which is sorted, too."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.worst = (-self.gate(x)).topk(CHOSEN, dim=-1)[1].view(-1)
        return super().route(x)

    def count(self, chosen: Tensor) -> Tensor:
        self.worst.argsort()
        return self.worst.bincount(minlength=EXPERTS)

    def run(self, i: int, rows: Tensor, start: int, end: int) -> Tensor:
        return self.experts[i](rows[start:end])  # refused


class HowManyEntries(Joined):
    """`bincount` has no entries for the last experts where nobody chose them."""

    def count(self, chosen: Tensor) -> Tensor:
        return chosen.view(-1).bincount()

    def numbers(self, counts: Tensor) -> Any:
        found = counts.cpu().numpy()
        self.entries = len(found)
        return found

    def back(self, outs: Tensor, order: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        return super().back(outs, order, weights / self.entries, chosen)  # refused


class RunOfRun(Scattered):
    """A run is cut again: of the second expert's, nothing may be left."""

    def cut(self, tokens: Tensor, start: int, end: int) -> Tensor:
        return tokens[start:end][start:end]  # refused


class NumbersRepeated(Numbered):
    """All tokens, and all once more: no slot has the number of its own."""

    def numbers(self, tokens: int, chosen: Tensor) -> Tensor:
        return torch.arange(tokens).repeat(CHOSEN)


class NumbersShifted(Numbered):
    """Slots have the number of the token before theirs."""

    def numbers(self, tokens: int, chosen: Tensor) -> Tensor:
        return torch.arange(-1, tokens - 1).repeat_interleave(CHOSEN) % tokens


class NumbersChanged(Numbered):
    """The first token's slots get another number, through a view, before they are sorted."""

    def numbers(self, tokens: int, chosen: Tensor) -> Tensor:
        found = torch.arange(tokens).repeat_interleave(CHOSEN)
        found[:1].fill_(tokens - 1)  # refused
        return found


class ByMask(Joined):
    """Rows by a sort that may leave those of an expert in any order, and by a mask."""

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        self.slots, self.flat = x.repeat_interleave(CHOSEN, 0), chosen.view(-1)
        return super().mix(x, weights, chosen)

    def sort(self, chosen: Tensor) -> Tensor:
        self.order = chosen.view(-1).argsort()
        return self.order

    def run(self, i: int, rows: Tensor, start: int, end: int) -> Tensor:
        mine = self.slots[self.order[start:end]]
        return self.experts[i](mine) + self.slots[torch.where(self.flat == i)[0]]  # refused


EXACT: dict[str, Callable[[], nn.Module]] = {
    "joined": Joined,
    "inverted": Inverted,
    "scattered": Scattered,
    "grouped": Grouped,
}
MIXING: dict[str, Callable[[], nn.Module]] = {
    "rolled": Rolled,
    "over rows": OverRows,
    "first doubled": FirstDoubled,
    "written later": WrittenLater,
    "in place": InPlace,
    "backwards": Backwards,
    "others' weights": OthersWeights,
    "other order's weights": OtherOrdersWeights,
    "rows of others": RowsOfOthers,
    "not inverted": NotInverted,
    "descending": Descending,
    "narrowed": Narrowed,
    "written before": WrittenBefore,
    "written after": WrittenAfter,
    "by count": ByCount,
    "capacity": Capacity,
    "clamped": Clamped,
    "nothing counted": NothingCounted,
    "others' counts": OthersCounts,
    "how many entries": HowManyEntries,
    "run of run": RunOfRun,
    "numbers repeated": NumbersRepeated,
    "numbers shifted": NumbersShifted,
    "numbers changed": NumbersChanged,
    "by mask": ByMask,
    "others counted first": OthersCountedFirst,
    "counts swapped": CountsSwapped,
    "half counted": HalfCounted,
}
# Where these are refused; the others at the line that is marked.
SORTED, COUNTED = "return chosen.view(-1).argsort()", "return counts.cpu().numpy()"
ADDED = "y.index_add_(0, token, gate * expert(x.index_select(0, token)))"
SPLIT = "parts = x[token].split(sizes, dim=0)"
ELSEWHERE = {
    "others counted first": SPLIT,
    "counts swapped": SPLIT,
    "half counted": SPLIT,
    "others' weights": SORTED,
    "other order's weights": SORTED,
    "rows of others": SORTED,
    "not inverted": SORTED,
    "descending": "return self.experts[i](rows[start:end])",
    "numbers repeated": ADDED,
    "numbers shifted": ADDED,
}


def numbered_experts() -> nn.Module:
    """A decoder with two of the ways to number the tokens."""
    made = iter([NumberedWide, NumberedBySlot])
    return decoder(lambda: next(made)(), layers=2)


def experts_counted_first() -> nn.Module:
    """A decoder in which how many rows each expert gets is asked before they are sorted."""
    made = iter([CountedFirst, BincountFirst])
    return decoder(lambda: next(made)(), layers=2)


def sorted_experts() -> nn.Module:
    """A decoder with one of each."""
    made = iter(EXACT.values())
    return Decoder(mlp=lambda: next(made)())
