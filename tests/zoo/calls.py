"""One decoder whose forward is called, and answers, in the ways people write."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.awkward import VOCAB, WIDTH, Decoder


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.reshape(-1, VOCAB), targets.reshape(-1))


@dataclass
class Output:
    loss: Tensor | None
    logits: Tensor


class ReturnsDataclass(Decoder):
    def forward(self, ids: Tensor, targets: Tensor | None = None) -> Output:
        logits = super().forward(ids)
        return Output(None if targets is None else loss_of(logits, targets), logits)


class ReturnsNamespace(Decoder):
    def forward(self, ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(aux=torch.zeros(()), logits=super().forward(ids))


class Kept:
    """No dataclass: one layer's state, and who made it."""

    def __init__(self, owner: nn.Module, state: Tensor) -> None:
        self.owner, self.state, self.itself = owner, state, self


class ReturnsObjects(Decoder):
    """Beside the logits, in an object that holds them."""

    def forward(self, ids: Tensor) -> Answer:
        kept = []
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
            kept.append(Kept(block, x[None]))
        return Answer(self.head(self.norm(x)), kept)


class Answer:
    def __init__(self, logits: Tensor, kept: list[Kept]) -> None:
        self.logits, self.kept = logits, kept


class LossFirst(Decoder):
    def forward(self, ids: Tensor, targets: Tensor | None = None) -> tuple[Tensor | None, Tensor]:
        logits = super().forward(ids)
        return None if targets is None else loss_of(logits, targets), logits


class CacheUnused(Decoder):
    """A cache and a start that nobody passes."""

    def forward(
        self, ids: Tensor, cache: list[Tensor] | None = None, start_pos: int = 0
    ) -> dict[str, Tensor | None]:
        assert start_pos == 0
        return {"logits": super().forward(ids), "cache": None if cache is None else cache[0]}


class LogProbabilities(Decoder):
    def forward(self, ids: Tensor) -> Tensor:
        return F.log_softmax(super().forward(ids), dim=-1)


EXACT: dict[str, Callable[[], nn.Module]] = {
    "dataclass": ReturnsDataclass,
    "namespace": ReturnsNamespace,
    "objects": ReturnsObjects,
    "loss first": LossFirst,
    "cache unused": CacheUnused,
    "log-probabilities": LogProbabilities,
}


class HiddenBeside(Decoder):
    """The last hidden state has more features than there are tokens."""

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return {"hidden": x, "logits": self.head(self.norm(x)), "value": x.mean(-1, keepdim=True)}


EXACT["hidden state beside"] = HiddenBeside


class ShortVocabulary(Decoder):
    """Fewer logits than ids, and a hidden state wider than both."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, VOCAB - 5, bias=False)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)), x


class TwoHeads(Decoder):
    """Of one width: the next token, and the one after it."""

    def forward(self, ids: Tensor) -> list[Tensor]:
        logits = super().forward(ids)
        return [logits, logits.flip(-1)]


IMAGE = 5


class ImageIds(Decoder):
    """The id of an image is looked up as id 0, by arithmetic on each id."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(torch.where(ids == IMAGE, 0, ids))


class ImageIdsWritten(Decoder):
    """The same, written to a copy of the ids."""

    def forward(self, ids: Tensor) -> Tensor:
        looked_up = ids.clone()
        looked_up[ids == IMAGE] = 0
        return super().forward(looked_up)


class PaddedVocabulary(Decoder):
    """More logits than ids that can be looked up."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, 128, bias=False)


EXACT |= {
    "image ids": ImageIds,
    "image ids written": ImageIdsWritten,
    "padded vocabulary": PaddedVocabulary,
}


class BigramIds(Decoder):
    """What is looked up depends on the token before, too."""

    def forward(self, ids: Tensor) -> Tensor:
        before = torch.cat((torch.zeros_like(ids[:, :1]), ids[:, :-1]), 1)
        return super().forward((ids + before) % VOCAB)


class TimeFirst(Decoder):
    """``[T, B]`` in and ``[T, B, V]`` out."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids.t()).transpose(0, 1)


# Not taken today, each with a reason and never with other numbers.
REFUSED: dict[str, Callable[[], nn.Module]] = {
    "bigram ids": BigramIds,
    "short vocabulary": ShortVocabulary,
    "two heads": TwoHeads,
}
