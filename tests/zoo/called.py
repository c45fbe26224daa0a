"""One small decoder whose forward is not called with token ids ``[B, T]`` alone for logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.awkward import VOCAB, Decoder
from tests.zoo.calls import loss_of

__all__ = ["LAYOUTS", "LOSSES", "NEEDING", "READING", "Tiny"]


class Tiny(Decoder):
    """One block."""

    def __init__(self, **kinds: Any) -> None:
        super().__init__(**kinds)
        self.blocks = self.blocks[:1]

    def logits(self, ids: Tensor) -> Tensor:
        return Decoder.forward(self, ids)


class Packed(Tiny):
    """One sequence without a batch axis."""

    def forward(self, ids: Tensor) -> Tensor:
        return self.logits(ids[None])[0]


class OneRow(Tiny):
    """A batch of one, taken off inside."""

    def forward(self, ids: Tensor) -> Tensor:
        return self.logits(ids).squeeze(0)


class OneRowAsserted(Tiny):
    def forward(self, ids: Tensor) -> Tensor:
        assert ids.shape[0] == 1
        return self.logits(ids)


class RowByRow(Tiny):
    """A loop over the batch."""

    def forward(self, ids: Tensor) -> Tensor:
        return torch.stack([self.logits(ids[b : b + 1])[0] for b in range(ids.shape[0])])


class OverRows(Tiny):
    def forward(self, ids: Tensor) -> Tensor:
        return torch.stack([self.logits(row[None])[0] for row in ids])


LAYOUTS: dict[str, type[nn.Module]] = {
    "[T]": Packed,
    "[1, T] squeezed": OneRow,
    "[1, T] asserted": OneRowAsserted,
    "row by row": RowByRow,
    "over rows": OverRows,
}


class Loss(Tiny):
    """Never returns logits."""

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        return loss_of(self.logits(ids), targets)


class OwnTargets(Tiny):
    """The next token, made of the ids."""

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        logits = self.logits(ids)[:, :-1]
        return {"loss": nn.CrossEntropyLoss()(logits.transpose(1, 2), ids[:, 1:])}


class PackedLoss(Tiny):
    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        return loss_of(self.logits(ids[None]), targets)


class ShiftedLoss(Tiny):
    """As in transformers; the second `contiguous()` gives back what it is asked."""

    def forward(self, ids: Tensor) -> Tensor:
        logits = self.logits(ids)[..., :-1, :].contiguous().contiguous()
        return loss_of(logits, ids[..., 1:].contiguous())


class FlatLoss(Tiny):
    """The head is given the tokens of all rows at once, as in the speed runs."""

    def rows(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        logits = self.head(self.rows(ids).flatten(0, 1))
        return F.cross_entropy(logits, targets.flatten(), reduction="mean")


class FlatTimeFirstLoss(FlatLoss):
    """As many rows, in another order than the ids."""

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        logits = self.head(self.rows(ids).transpose(0, 1).flatten(0, 1))
        return F.cross_entropy(logits, targets.t().flatten())


class LastOfEachRow(Tiny):
    def forward(self, ids: Tensor) -> Tensor:
        return torch.stack([row[-1] for row in self.logits(ids)])


class GatheredLoss(Tiny):
    """Of log-probabilities, by hand."""

    def forward(self, ids: Tensor) -> Tensor:
        scores = torch.log_softmax(self.logits(ids)[:, :-1], dim=-1)
        return -scores.gather(-1, ids[:, 1:, None]).mean()


class LikelihoodLoss(Tiny):
    def forward(self, ids: Tensor) -> Tensor:
        scores = self.logits(ids).log_softmax(-1)[:, :-1]
        return F.nll_loss(scores.flatten(0, 1), ids[:, 1:].flatten())


class LogSumLoss(Tiny):
    def forward(self, ids: Tensor) -> Tensor:
        logits = self.logits(ids)[:, :-1]
        right = logits.gather(-1, ids[:, 1:, None]).squeeze(-1)
        return (torch.logsumexp(logits, -1) - right).mean()


class RoutedLoss(Tiny):
    """What is normalised is no vocabulary."""

    def forward(self, ids: Tensor) -> Tensor:
        chosen = torch.log_softmax(self.embed(ids)[..., :4], -1).exp().mean()
        wrong = 1 - self.logits(ids).softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])
        return wrong.mean() + chosen


class PoliteLoss(RoutedLoss):
    """Both."""

    def forward(self, ids: Tensor) -> Tensor:
        scores = F.log_softmax(self.logits(ids), dim=-1)
        return super().forward(ids) - scores[:, :-1].gather(-1, ids[:, 1:, None]).mean()


LOSSES: dict[str, type[nn.Module]] = {
    "flat loss": FlatLoss,
    "gathered loss": GatheredLoss,
    "likelihood loss": LikelihoodLoss,
    "log-sum loss": LogSumLoss,
    "loss beside a router": PoliteLoss,
    "shifted loss": ShiftedLoss,
    "loss": Loss,
    "own targets": OwnTargets,
    "packed loss": PackedLoss,
}


class Targets(Tiny):
    """Required, and nothing but the loss depends on it."""

    def forward(self, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.logits(ids)
        return logits, loss_of(logits, targets)


class PaddingMask(Tiny):
    """Multiplied into the values that the blocks see."""

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.embed(ids) * mask[..., None]
        return self.head(self.norm(self.blocks[0](x)))


class Given(nn.Module):
    """Stands for the mask that forward is given."""

    mask: Tensor

    def forward(self, length: int) -> Tensor:
        return self.mask


class GivenMask(Tiny):
    def __init__(self) -> None:
        super().__init__(mask=Given)

    def forward(self, ids: Tensor, mask: Tensor, *, train: bool) -> Tensor:
        assert not train
        self.blocks[0].attention.mask.mask = mask[:, None]
        return self.logits(ids)


class Learned(Tiny):
    """Positions by number, from a start."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Embedding(40, 64)

    def forward(self, ids: Tensor, positions: Tensor, start: int) -> Tensor:
        x = self.embed(ids) + self.places(positions + start)
        return self.head(self.norm(self.blocks[0](x)))


class Table(Tiny):
    """Rows that are added, one for each position."""

    def forward(self, ids: Tensor, table: Tensor, scales: list[Tensor]) -> Tensor:
        x = self.embed(ids) * scales[0] + table
        return self.head(self.norm(self.blocks[0](x)))


IDS = torch.arange(22).view(2, 11) % VOCAB
COUNTED = torch.arange(11).expand(2, 11)

# name -> model, arguments of one call of which the ids are the first, the same for one sequence
NEEDING: dict[str, tuple[type[nn.Module], Any, Callable[[Tensor], Any]]] = {
    "targets": (Targets, None, lambda ids: (ids, ids)),
    "a mask of ones": (
        PaddingMask, (IDS, torch.ones(2, 11)), lambda ids: (ids, torch.ones(ids.shape))
    ),
    "positions": (
        Learned, {"ids": IDS, "positions": COUNTED, "start": 2},
        lambda ids: (ids, torch.arange(ids.shape[1])[None], 2),
    ),
}  # fmt: skip


class ReadsTargets(Tiny):
    def forward(self, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.logits(ids) + targets[..., None]
        return logits, loss_of(logits, targets)


class LossOfOthers(Tiny):
    """The last token is a target only: there is no row for it."""

    def forward(self, ids: Tensor) -> Tensor:
        return loss_of(self.logits(ids[:, :-1]), ids[:, 1:])


READING: dict[str, type[nn.Module]] = {
    "targets": ReadsTargets,
    "loss": LossOfOthers,
    "router": RoutedLoss,
    "time first": FlatTimeFirstLoss,
}
