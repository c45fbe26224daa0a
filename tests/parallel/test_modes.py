"""A sharded model never leaves out what the original does in training mode."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

import fxport
from fxport.parallel.modes import training_differs
from tests.zoo.gpt import GPT


class Noisy(nn.Module):
    """Dropout as a function: no module says so."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(61, 24), nn.Linear(24, 61)
        self.p = p

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(F.dropout(self.embed(ids), self.p, self.training))


def test_dropout_follows_the_mode():
    model, ids = Noisy(0.5).train(), torch.arange(60).view(4, 15)
    module = fxport.parallelize(model, fxport.ParallelContext(0, 1))
    assert model.training and module.training
    first, second = module(ids), module(ids)
    assert not torch.allclose(first, second)
    torch.testing.assert_close(module.eval()(ids), model.eval()(ids))


def test_no_difference_without_dropout_or_in_eval_mode():
    assert training_differs(Noisy(0.0).train()) is None
    assert training_differs(Noisy(0.1).eval()) is None
    assert training_differs(GPT(dropout=0.0).train()) is None


def test_linears_are_planned_and_counted():
    model = GPT(n_head=4)
    layers = len([m for m in model.modules() if type(m).__name__ == "Block"])
    ids = torch.zeros(2, 11, dtype=torch.long)
    found = fxport.explain(model).linears
    assert found is not None
    kinds = [site.sharding for site in found]
    assert kinds.count("column") == 2 * layers and kinds.count("row") == 2 * layers
    counts = {kind: kinds.count(kind) for kind in kinds}
    from fxport.testing import assert_rewrites

    assert_rewrites(model, (ids,), attention=layers, linear=counts)
    with pytest.raises(AssertionError, match="linear"):
        assert_rewrites(model, (ids,), attention=layers, linear={"column": 1})


class LayerDrop(Noisy):
    """Skips its layer by chance, in training only."""

    def __init__(self) -> None:
        super().__init__(0.0)
        self.layer = nn.Linear(24, 24)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        if not self.training or torch.rand([]) >= 0.5:
            x = x + self.layer(x).relu()
        return self.head(x)


def test_layers_dropped_by_chance_are_divided_in_eval_mode_alone():
    model, ids = LayerDrop().eval(), torch.arange(60).view(4, 15)
    module = fxport.parallelize(model, fxport.ParallelContext(0, 1))
    torch.testing.assert_close(module(ids), model(ids))
    with pytest.raises(fxport.FxportError, match=r"cannot be captured .* in training mode"):
        module.train()
    with pytest.raises(fxport.PortError, match="another path"):
        fxport.parallelize(model.train(), fxport.ParallelContext(0, 1))


class LongOnly(Noisy):
    """Another path in one of the modes, for sequences of more than 20 tokens."""

    def __init__(self, mode: bool) -> None:
        super().__init__(0.0)
        self.mode = mode

    def forward(self, ids: Tensor) -> Tensor:
        x = super().forward(ids)
        return x * 2 if ids.shape[1] > 20 and self.training is self.mode else x


class LongOnlyAsANumber(LongOnly):
    """The same, of a length that is taken as a plain number."""

    def forward(self, ids: Tensor) -> Tensor:
        x = Noisy.forward(self, ids)
        return x * 2 if 50 > int(ids.shape[1]) > 20 and self.training is self.mode else x


def test_modes_are_compared_at_every_length():
    as_a_number = LongOnlyAsANumber(True).eval()
    module = fxport.parallelize(as_a_number, fxport.ParallelContext(0, 1))
    with pytest.raises(fxport.FxportError, match=r"in training mode"):
        module.train()
    for mode in (True, False):
        for training in (True, False):
            model = LongOnly(mode).train(training)
            if training is mode or training:
                with pytest.raises(fxport.PortError, match="differs between"):
                    fxport.parallelize(model, fxport.ParallelContext(0, 1))
                continue
            module = fxport.parallelize(model, fxport.ParallelContext(0, 1))
            with pytest.raises(fxport.FxportError, match=r"cannot be captured .* in training mode"):
                module.train()


def test_batch_statistics_are_seen():
    """One operation for both modes: what it does, a flag says."""
    norm = nn.BatchNorm1d(24)

    def step(x: Tensor, training: bool) -> Tensor:
        norm.training = training
        return norm(x.transpose(1, 2)).transpose(1, 2)

    refuses_both_modes(step, "")


WEIGHTS = [nn.Parameter(torch.full((24,), 0.1 * n)) for n in range(2)]
BY_MODE = {
    "a flag": lambda x, training: F.batch_norm(
        x.flatten(0, 1), torch.zeros(24), torch.ones(24), training=training
    ).view_as(x),
    "a number": lambda x, training: x * (2.0 if training else 1.0),
    "a parameter": lambda x, training: x * WEIGHTS[int(training)],
    "a constant": lambda x, training: x * torch.tensor([2.0 if training else 1.0]),
    "an operand": lambda x, training: (x.sin() - x.cos(), x.cos() - x.sin())[training],
    "an order": lambda x, training: x.cumsum(-1).flip(-1) if training else x.flip(-1).cumsum(-1),
}


@pytest.mark.parametrize("name", BY_MODE)
def test_what_else_follows_the_mode_is_seen(name: str):
    refuses_both_modes(BY_MODE[name], "the model (runs|takes)")


class ByMode(Noisy):
    def __init__(self, step: Callable[[Tensor, bool], Tensor]) -> None:
        super().__init__(0.0)
        self.step, self.weights = step, nn.ParameterList(WEIGHTS)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.step(self.embed(ids), self.training))


def refuses_both_modes(step: Callable[[Tensor, bool], Tensor], why: str) -> None:
    model, context = ByMode(step).eval(), fxport.ParallelContext(0, 1)
    module, ids = fxport.parallelize(model, context), torch.arange(60).view(4, 15)
    torch.testing.assert_close(module(ids), model(ids))
    with pytest.raises(fxport.FxportError, match=f"{why}.* in training mode"):
        module.train()
    with pytest.raises(fxport.FxportError, match="more than dropout"):
        fxport.parallelize(model.train(), context)


def test_the_experts_of_hugging_face_in_their_usual_implementation():
    """grouped_mm, which has no shapes for float32: the modes are compared on what is captured."""
    sizes = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 61,
        "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 3,
    }  # fmt: skip
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**sizes)).train()
    assert model.config._experts_implementation == "grouped_mm"
    module = fxport.parallelize(model, fxport.ParallelContext(0, 1))
    ids = torch.randint(61, (3, 7))
    torch.testing.assert_close(module(ids), model(ids).logits)
