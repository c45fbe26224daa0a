"""Models that are not called ``forward(ids[B, T])``: proven as they are called, or refused."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fxport
from fxport import api, verification
from fxport.backends.torch import PackedModel
from fxport.errors import FxportError, PortError, ReasonCode
from fxport.report import Decision, Outcome
from tests.zoo import called
from tests.zoo.awkward import LIMIT, VOCAB, WIDTH


@pytest.fixture(autouse=True)
def float_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half precision is captured in the same way."""
    decision = Decision("precision", Outcome.PROVEN, "serving dtype")
    monkeypatch.setattr(api, "_half", lambda *_: (None, decision))


def check(port: fxport.Port, logits_of: Callable[[Tensor], Tensor], longest: int = 50) -> None:
    """Packed sequences against the original, one at a time."""
    packed = PackedModel(port.serving, port.parameters)
    sequences = [torch.randint(0, VOCAB, (n,)) for n in (1, 13, 2, longest)]
    for sequence, found in zip(sequences, packed(sequences), strict=True):
        with torch.no_grad():
            expected = logits_of(sequence[None])
        torch.testing.assert_close(found, expected.view(-1, VOCAB), rtol=0.0, atol=1e-12)


def said(port: fxport.Port) -> dict[str, str]:
    return {d.subject: d.detail for d in port.report.decisions if d.pass_name == "capture"}


def made(name: str, kinds: dict[str, Any]) -> Any:
    torch.manual_seed(5)
    return kinds[name]().double().eval()


@pytest.mark.parametrize("name", called.LAYOUTS)
def test_layouts(name: str) -> None:
    model = made(name, called.LAYOUTS)
    port = fxport.port(model)
    assert "the port takes [B, T]" in said(port)["layout of the tokens"]
    assert port.report.facts["max_position_embeddings"] == LIMIT
    check(port, lambda ids: model(ids[0] if name == "[T]" else ids))


@pytest.mark.parametrize("name", called.LOSSES)
def test_the_logits_of_a_loss(name: str) -> None:
    model = made(name, called.LOSSES)
    port = fxport.port(model)
    assert "cross entropy" in said(port)["loss"]
    check(port, model.logits)


@pytest.mark.parametrize("name", called.NEEDING)
def test_other_arguments(name: str) -> None:
    kind, example, arguments = called.NEEDING[name]
    torch.manual_seed(5)
    model = kind().double().eval()
    port = fxport.port(model, example)
    assert len(said(port)) == len(inspect.signature(model.forward).parameters) - 1

    def logits_of(ids: Tensor) -> Tensor:
        result = model(*arguments(ids))
        return result[0] if isinstance(result, tuple) else result

    check(port, logits_of, longest=30)


class ByName(called.Tiny):
    def forward(self, *, ids: Tensor, scale: float = 1.0) -> Tensor:
        return self.logits(ids) * scale


class AnyNames(called.Tiny):
    def forward(self, **data: Any) -> Tensor:
        return self.logits(data["ids"]) * data.get("scale", 1.0)


@pytest.mark.parametrize(
    ("kind", "example"),
    [
        (ByName, None),
        (ByName, {"ids": called.IDS, "scale": 2.0}),
        (AnyNames, {"ids": called.IDS}),
        (AnyNames, {"scale": 2.0, "ids": called.IDS}),
    ],
)
def test_token_ids_by_name(kind: type[called.Tiny], example: Any) -> None:
    torch.manual_seed(5)
    model = kind().double().eval()
    others = {k: v for k, v in (example or {}).items() if k != "ids"}
    check(fxport.port(model, example), lambda ids: model(ids=ids, **others), longest=30)


def test_names_that_nobody_knows_are_asked_for() -> None:
    with pytest.raises(PortError, match=r"forward takes `\*\*data`: nobody knows") as caught:
        fxport.port(AnyNames())
    assert caught.value.reasons[0].location is not None


@pytest.mark.parametrize("inner, outer", [(True, False), (0.0, float("-inf")), (1, 0)])
def test_a_triangle(inner: Any, outer: Any) -> None:
    torch.manual_seed(5)
    seen = torch.ones(11, 11, dtype=torch.bool).tril()
    mask = torch.where(seen, torch.tensor(inner), torch.tensor(outer))[None]
    found = _argument(mask)
    for length in (1, 2, 7):
        expected = mask[:, :length, :length]
        made_for = found(torch.zeros(3, length, dtype=torch.long))
        assert made_for.dtype == mask.dtype and torch.equal(made_for, expected)


def _argument(value: Any) -> Callable[[Tensor], Any]:
    """What forward is given beside other token ids than those of the example."""
    from fxport.capture.extra_arguments import token_ids_alone

    class Asked(torch.nn.Module):
        def forward(self, ids: Tensor, value: Any) -> Any:
            return value

    return token_ids_alone(Asked(), (called.IDS, value))[0]


TABLE, NUMBERS = torch.randn(11, 6), torch.randn(7)


@pytest.mark.parametrize(
    "value, expected",
    [
        (torch.ones(2, 1, 1, 11), torch.ones(3, 1, 1, 5)),
        (torch.zeros(1, 11, 4, dtype=torch.bool), torch.zeros(1, 5, 4, dtype=torch.bool)),
        (torch.arange(3, 14)[None], torch.arange(3, 8)[None]),
        (torch.arange(11.0).expand(2, 11), torch.arange(5.0).expand(3, 5)),
        (TABLE, TABLE[:5]),
        (NUMBERS, NUMBERS),
    ],
)
def test_tensors_by_what_they_show(value: Tensor, expected: Tensor) -> None:
    found = _argument([value, None, 3])(torch.zeros(3, 5, dtype=torch.long))
    assert found[1:] == [None, 3]
    assert found[0].dtype == value.dtype and torch.equal(found[0], expected)


def test_a_mask_and_a_flag() -> None:
    torch.manual_seed(5)
    model = called.GivenMask().double().eval()
    mask = torch.ones(1, 11, 11, dtype=torch.bool).tril()
    port = fxport.port(model, {"ids": called.IDS, "mask": mask, "train": False})
    assert said(port)["argument `train`"] == "always False"

    def logits_of(ids: Tensor) -> Tensor:
        size = ids.shape[1]
        return model(ids, torch.ones(1, size, size, dtype=torch.bool).tril(), train=False)

    check(port, logits_of)


def test_a_table_ends_where_the_example_does() -> None:
    torch.manual_seed(5)
    model = called.Table().double().eval()
    table, scales = torch.randn(11, WIDTH).double(), [torch.randn(WIDTH).double()]
    port = fxport.port(model, (called.IDS, table, scales))
    assert port.report.facts["max_position_embeddings"] == 11
    packed = PackedModel(port.serving, port.parameters)
    ids = called.IDS[0]
    with torch.no_grad():
        expected = model(ids[None], table, scales)[0]
    torch.testing.assert_close(packed([ids])[0], expected, rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("example", [None, (called.IDS, called.IDS)])
def test_logits_that_read_an_unknown_argument_are_refused(example: Any) -> None:
    with pytest.raises(PortError, match="the logits depend on `targets`"):
        fxport.port(made("targets", called.READING), example)


def test_a_loss_without_a_row_for_each_token_is_refused() -> None:
    with pytest.raises(PortError, match="one row of logits for each token") as caught:
        fxport.port(made("loss", called.READING))
    assert caught.value.reasons[0].code is ReasonCode.NO_LOGITS


def test_what_a_router_normalises_is_no_logits() -> None:
    with pytest.raises(PortError) as caught:
        fxport.port(made("router", called.READING))
    assert caught.value.reasons[0].code is ReasonCode.NO_LOGITS


def test_a_loop_over_rows_may_give_the_last_position_alone() -> None:
    model = made("last of each row", {"last of each row": called.LastOfEachRow})
    port = fxport.port(model)
    assert "one row after the other" in said(port)["layout of the tokens"]
    check(port, model.logits)


def test_a_loss_of_rows_in_another_order_is_refused() -> None:
    with pytest.raises(PortError, match="cuts through the batch or token axis"):
        fxport.port(made("time first", called.READING))


class MixedRows(called.RowByRow):
    """A loop over the batch, and every sequence sees the others."""

    def forward(self, ids: Tensor) -> Tensor:
        logits = super().forward(ids)
        return logits + logits.mean(0, keepdim=True)


def test_rows_that_see_each_other_are_refused() -> None:
    torch.manual_seed(5)
    with pytest.raises(PortError):
        fxport.port(MixedRows().double().eval())


IDS = called.IDS
WRONG = {
    "no ids": (torch.ones(2, 11), IDS.float()),
    "a square": (IDS[:, :2], 1),
    "too many": (IDS, 1, 2),
    "the length": (IDS, 11),
    "rows of no meaning": (IDS, torch.randn(2, 11)),
}


@pytest.mark.parametrize("name", WRONG)
def test_examples_that_say_nothing(name: str) -> None:
    class Asked(torch.nn.Module):
        def forward(self, ids: Tensor, value: Any) -> Tensor:
            return ids * value

    with pytest.raises(FxportError):
        fxport.port(Asked(), WRONG[name])


def test_verify_knows_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = verification.Comparison("trainable module", "", None, None, True, "")
    monkeypatch.setattr(verification, "_trainable", lambda *given: compiled)
    kind, example, _ = called.NEEDING["positions"]
    torch.manual_seed(5)
    model = kind().eval()
    directory = fxport.port(model, example).save(tmp_path / "port")
    assert fxport.verify(model, directory, example_inputs=example, engine=False)
