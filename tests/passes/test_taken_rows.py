"""Rows that are taken by their numbers: the last position in every spelling, and no other one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fxport
from fxport.capture.arguments import shape_of
from fxport.capture.export import capture
from fxport.errors import PortError, ReasonCode
from fxport.passes.functional import functionalise
from fxport.passes.head import find_head
from fxport.passes.taken_rows import name_taken_rows
from tests.passes.test_head import Model as Tail
from tests.passes.test_head import V
from tests.zoo.gpt import GPT

RIGHT = {
    "unbind": lambda h: h.unbind(1)[-1],
    "unbind, kept": lambda h: h.unbind(dim=1)[-1].unsqueeze(1),
    "select, unsqueeze": lambda h: h[:, -1].unsqueeze(1),
    "select, index": lambda h: h[:, -1][:, None] * 2.0,
    "split": lambda h: h.split(1, 1)[-1],
    "split with sizes": lambda h: h.split([h.shape[1] - 1, 1], 1)[1],
    "flip, select": lambda h: h.flip(1)[:, 0],
    "flip, slice": lambda h: h.flip(1)[:, :1],
    "flip twice, last": lambda h: h.flip(1).flip(1)[:, -1],
    "index_select": lambda h: torch.index_select(h, 1, torch.tensor([h.shape[1] - 1])),
    "index_select, counted back": lambda h: h.index_select(1, torch.tensor([h.shape[1]]) - 1),
    "index": lambda h: h[:, torch.tensor([h.shape[1] - 1])],
    "gather": lambda h: h.gather(1, (lengths(h) - 1).view(-1, 1, 1).expand(-1, 1, h.shape[2])),
    "gather of counted ones": lambda h: h.gather(
        1, (torch.ones_like(h[..., :1], dtype=torch.long).sum(1, keepdim=True) - 1).expand_as(
            h[:, :1]
        )
    ),
    "rows and lengths": lambda h: h[torch.arange(len(h)), lengths(h) - 1],
    "take_along_dim": lambda h: torch.take_along_dim(h, lengths(h).view(-1, 1, 1) - 1, 1),
}  # fmt: skip

WRONG = {
    "unbind, second last": lambda h: h.unbind(1)[-2],
    "unbind, first": lambda h: h.unbind(1)[0],
    "flip, second": lambda h: h.flip(1)[:, 1],
    "flip, last": lambda h: h.flip(1)[:, -1],
    "flip twice, first": lambda h: h.flip(1).flip(1)[:, 0],
    "flip another axis": lambda h: h.flip(2)[:, 0],
    "flip, another axis selected": lambda h: h.flip(1)[0][None],
    "index_select, second last": lambda h: h.index_select(1, torch.tensor([h.shape[1] - 2])),
    "gather, half way": lambda h: h.gather(
        1, (lengths(h) // 2).view(-1, 1, 1).expand(-1, 1, h.shape[2])
    ),
    "gather, one feature": lambda h: h.gather(
        1, (lengths(h) - 1).view(-1, 1, 1).expand(-1, 1, 1)
    ).expand(-1, 1, h.shape[2]),
    "split with sizes, first": lambda h: h.split([1, h.shape[1] - 1], 1)[0],
}  # fmt: skip


def lengths(h: Tensor) -> Tensor:
    return torch.full((h.shape[0],), h.shape[1])


def model_of(take):
    torch.manual_seed(3)
    return type("M", (Tail,), {"logits": lambda self, h: self.out(take(h))})().eval()


@pytest.mark.parametrize("take", RIGHT.values(), ids=RIGHT)
def test_the_last_position_is_found_in_every_spelling(take):
    model = model_of(take)
    captured = capture(model)
    functionalise(captured.graph)
    name_taken_rows(captured.graph)
    head = find_head(captured.graph, captured.length)
    assert [d.subject for d in head.decisions if "last position" in d.subject]
    assert shape_of(head.logits) == (captured.batch, captured.length, V)
    captured.graph.recompile()
    ids = torch.randint(0, V, (2, 5))
    inputs = [
        ids if n.name == captured.tokens else captured.parameters[n.meta["input"].name]
        for n in captured.graph.graph.find_nodes(op="placeholder")
        if n.name == captured.tokens or n.meta["input"].name in captured.parameters
    ]
    kept = captured.graph.graph.find_nodes(op="placeholder")
    assert len(kept) == len(inputs)  # no stored number of a row is left
    found = captured.graph(*inputs)
    for t in range(1, 6):
        torch.testing.assert_close(found[:, t - 1], model(ids[:, :t]).view(2, V))


@pytest.mark.parametrize("take", WRONG.values(), ids=WRONG)
def test_another_position_is_not_taken_for_the_last(take):
    captured = capture(model_of(take))
    functionalise(captured.graph)
    name_taken_rows(captured.graph)
    head = find_head(captured.graph, captured.length)
    assert not [d.subject for d in head.decisions if "last position" in d.subject]


def ported(change):
    class Changed(GPT):
        def forward(self, ids):
            x = self.transformer.wte(ids)
            for block in self.transformer.h:
                x = change(block(x))
            return self.lm_head(x)

    torch.manual_seed(3)
    return fxport.port(Changed(37, 24, 3, 1, 40).eval())


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.gather(1, torch.arange(x.shape[1]).view(1, -1, 1).expand_as(x)),
        lambda x: torch.take_along_dim(x, torch.arange(x.shape[1])[None, :, None], 1),
        lambda x: x.index_select(1, torch.arange(x.shape[1])),
        lambda x: x[:, torch.arange(x.shape[1])],
        lambda x: x.flip(1).flip(1),
    ],
)
def test_every_token_takes_its_own_row(change):
    assert ported(change).report.facts["vocab_size"] == 37


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.gather(1, (torch.arange(x.shape[1]) - 1).clamp(0).view(1, -1, 1).expand_as(x)),
        lambda x: x.index_select(1, torch.arange(x.shape[1] - 1, -1, -1)),
        lambda x: torch.take_along_dim(x, torch.zeros_like(x, dtype=torch.long), 1),
        lambda x: x.flip(1),
        lambda x: x.flip(1).flip(2),
    ],
)
def test_rows_of_other_tokens_are_refused(change):
    with pytest.raises(PortError) as error:
        ported(change)
    assert error.value.reasons[0].location is not None
    assert error.value.reasons[0].code is not ReasonCode.SELF_CHECK


PLACES = {
    "grid": lambda pe, ids: pe[grid(*ids.shape, indexing="ij")[1]],
    "grid, columns first": lambda pe, ids: pe[grid(*ids.shape[::-1], indexing="xy")[0]],
    "split": lambda pe, ids: pe.split([ids.shape[1], 40 - ids.shape[1]])[0],
}
ELSEWHERE = {
    "the rows of a grid": lambda pe, ids: pe[grid(*ids.shape, indexing="ij")[0]],
    "the end of a table": lambda pe, ids: pe.split([40 - ids.shape[1], ids.shape[1]])[1],
}


def grid(*sizes: int, indexing: str):
    return torch.meshgrid(*map(torch.arange, sizes), indexing=indexing)


def placed(place):
    class Placed(GPT):
        def forward(self, ids):
            x = self.transformer.wte(ids) + place(self.transformer.wpe.weight, ids)
            return self.lm_head(self.transformer.h[0](x))

    torch.manual_seed(3)
    return fxport.port(Placed(37, 24, 3, 1, 40).eval())


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_positions_are_found_where_a_table_falls_into_parts(place):
    assert placed(place).report.facts["max_position_embeddings"] == 40


@pytest.mark.parametrize("place", ELSEWHERE.values(), ids=ELSEWHERE)
def test_other_rows_of_a_table_are_refused(place):
    with pytest.raises(PortError) as error:
        placed(place)
    assert error.value.reasons[0].code is not ReasonCode.SELF_CHECK


@pytest.mark.parametrize(
    "begin",
    [
        lambda ids: torch.cat([torch.full_like(ids[:, :1], 2), ids], 1),
        lambda ids: torch.nn.functional.pad(ids, (1, 0), value=2),
    ],
)
def test_a_token_of_the_models_own_is_refused_where_it_is_put_in(begin):
    class Begins(GPT):
        def forward(self, ids):
            x = self.transformer.wte(begin(ids))
            return self.lm_head(self.transformer.h[0](x)[:, 1:])

    with pytest.raises(PortError, match="before or behind the given ones") as error:
        fxport.port(Begins(37, 24, 3, 1, 40).eval())
    assert error.value.reasons[0].code is ReasonCode.MIXES_TOKENS
    assert error.value.reasons[0].location is not None
