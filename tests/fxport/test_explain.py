"""`fxport.explain` names what was rewritten and the right line of what was not."""

from __future__ import annotations

import inspect
import json
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxport
from fxport.errors import FxportError, FxportWarning, Location, PortError, Reason, ReasonCode
from fxport.explain_records import Door, Explanation, LinearSite, Site
from fxport.explain_text import layer_names
from fxport.report import Outcome

VOCAB, WIDTH, HEADS, LAYERS, LIMIT = 53, 24, 3, 4, 48


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error", FxportWarning)
        yield
    torch.compiler.reset()


def line_of(marker: str) -> int:
    """The line of this file that ends in ``# <marker>``."""
    lines = Path(__file__).read_text().splitlines()
    (found,) = [i for i, line in enumerate(lines, 1) if line.endswith(f"# {marker}")]
    return found


def heads_of(x: Tensor) -> Tensor:
    return x.view(*x.shape[:2], HEADS, WIDTH // HEADS).transpose(1, 2)


class Attention(nn.Module):
    """`how`: what is written between the scores and their product with the values."""

    def __init__(self, how: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.how = how
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("mask", torch.ones(LIMIT, LIMIT).tril().bool())

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads_of(t) for t in self.qkv(x).chunk(3, dim=-1))
        scores = q @ k.transpose(-2, -1) / math.sqrt(WIDTH // HEADS)
        y, extra = self.how(scores, v, self.mask[: x.shape[1], : x.shape[1]])
        return self.out(y.transpose(1, 2).reshape(x.shape)) + extra


def plain(scores: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    return scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v, v.new_zeros(1)


def watched(scores: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return weights @ v, weights.amax()  # watched


def other_axis(scores: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    scores = scores.masked_fill(~mask, -1e9)
    return scores.softmax(-2) @ v, v.new_zeros(1)  # other axis


def scaled_mask(scores: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    scores = scores * scores.cos()  # mask
    return scores.softmax(-1) @ v, v.new_zeros(1)


def odd_mask(scores: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Constant, but no flag says it: every third key."""
    keys = torch.arange(scores.shape[-1])
    third = (keys[None] % 3 == 0) | (keys[None] == keys[:, None])
    scores = scores.masked_fill(~third, float("-inf"))  # odd mask
    return scores.softmax(-1) @ v, v.new_zeros(1)


class Block(nn.Module):
    def __init__(self, how: Any) -> None:
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(WIDTH), Attention(how)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm(x))
        return x + self.down(F.gelu(self.up(x)))


class Model(nn.Module):
    def __init__(self, *hows: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wte, self.wpe = nn.Embedding(VOCAB, WIDTH), nn.Embedding(LIMIT, WIDTH)
        self.blocks = nn.ModuleList(Block(how) for how in hows)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1]))  # positions
        for block in self.blocks:
            x = block(x)
        return self.head(x)


IDS = torch.randint(0, VOCAB, (2, 7))


def training(model: nn.Module) -> Explanation:
    """The training door: a function, so that token ids are not taken for the serving door."""
    return fxport.explain(lambda ids: model(ids), IDS)


# --- the training door ------------------------------------------------------------------------


def test_all_is_well_in_training() -> None:
    found = training(Model(*[plain] * LAYERS))
    assert found.door is Door.TRAINING and found.ok
    assert [s.outcome for s in found.sites] == [Outcome.REWRITTEN] * LAYERS
    assert found.summary == "attention 4 of 4"
    text = str(found)
    assert "blocks.0..3.attn x 4" in text and "causal" in text and "3 heads" in text
    assert "scale 0.353553" in " ".join(text.split())
    assert all(len(line) <= 80 for line in text.splitlines())


@pytest.mark.parametrize(
    ("how", "marker", "code"),
    [
        (watched, "watched", ReasonCode.WEIGHTS_USED_ELSEWHERE),
        (other_axis, "other axis", None),
        (scaled_mask, "mask", None),
    ],
)
def test_what_is_left_names_its_line(how: Any, marker: str, code: ReasonCode | None) -> None:
    found = training(Model(plain, plain, how, plain))
    assert len(found.rewritten) == 3
    (stayed,) = [s for s in found.sites if s.outcome is not Outcome.REWRITTEN]
    assert stayed.reason is not None and stayed.reason.location is not None
    assert stayed.reason.location.file == __file__
    assert stayed.reason.location.line == line_of(marker), stayed.reason
    assert code is None or stayed.reason.code is code
    assert stayed.module.endswith("blocks.2.attn")
    assert stayed.reason.location.source in str(found)


def test_the_summary_comes_first() -> None:
    found = training(Model(plain, watched, plain, watched))
    first = " ".join(str(found).split("torch.compile")[0].split())
    where = f"test_explain.py:{line_of('watched')}"
    assert "attention 2 of 4, 2 left: attention weights used elsewhere" in first
    assert where in first and first.count(where) == 1
    assert not found.ok


def test_a_dense_mask_is_a_note() -> None:
    found = training(Model(odd_mask, plain, odd_mask, plain))
    assert len(found.rewritten) == 4 and not found.left and found.ok
    noted = [s for s in found.sites if s.notes]
    assert len(noted) == 2
    assert noted[0].notes[0].code is ReasonCode.MASK_NOT_PROVEN
    assert noted[0].notes[0].location.line == line_of("odd mask")
    assert "2 with a dense mask: mask not proven" in found.summary


def test_graph_breaks_are_counted_and_named() -> None:
    model = Model(*[plain] * LAYERS)

    def broken(ids: Tensor) -> Tensor:
        x = model.wte(ids)
        for i, block in enumerate(model.blocks):
            x = block(x)
            if i == 1 and x.sum() > 1e6:  # break
                x = x / 2
        return x

    found = fxport.explain(broken, IDS)
    assert len(found.rewritten) == LAYERS  # equal layers share a graph; each one is counted
    assert line_of("break") in [b.location.line for b in found.graph_breaks if b.location]
    assert f"test_explain.py:{line_of('break')}" in str(found)


def test_no_attention() -> None:
    found = fxport.explain(nn.Sequential(nn.Linear(5, 3), nn.Softmax(-1)), torch.randn(2, 5))
    assert found.summary == "attention: none found"
    (router,) = found.sites
    assert router.outcome is Outcome.PROVEN and router.reason is not None
    assert router.reason.code is ReasonCode.NOT_ATTENTION and found.ok


def test_a_function_needs_arguments() -> None:
    with pytest.raises(FxportError, match="needs the arguments"):
        fxport.explain(lambda x: x)


def test_explain_changes_nothing() -> None:
    model = Model(*[plain] * LAYERS)
    before = {n: p.clone() for n, p in model.state_dict().items()}
    expected = model(IDS)
    training(model)
    assert model.training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())
    assert torch.equal(model(IDS), expected)


# --- the serving door -------------------------------------------------------------------------


def test_all_is_well_in_serving() -> None:
    found = fxport.explain(Model(*[plain] * LAYERS), IDS)
    assert found.door is Door.SERVING and found.ok and not found.obstacles
    assert len(found.rewritten) == LAYERS
    assert found.training is not None and found.training.ok
    assert "left by torch.compile" not in str(found)
    (table,) = found.positions
    assert "wpe.weight" in table.subject and table.location is not None
    assert table.location.line == line_of("positions")
    assert "port: would succeed" in str(found)


def test_without_tokens_nothing_is_run() -> None:
    assert fxport.explain(Model(*[plain] * LAYERS)).training is None


class Returned(Model):
    """Gives back the weights of the second block; a port keeps the logits only."""

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1]))
        for i, block in enumerate(self.blocks):
            if i == 1:
                a = block.attn
                q, k, v = (heads_of(t) for t in a.qkv(block.norm(x)).chunk(3, dim=-1))
                scores = (q @ k.mT / 3).masked_fill(~a.mask[: ids.shape[1], : ids.shape[1]], -1e9)
                weights = scores.softmax(-1)  # returned
                x = x + a.out((weights @ v).transpose(1, 2).reshape(x.shape))
            else:
                x = block(x)
        return self.head(x), weights


def test_what_a_port_drops_and_training_keeps() -> None:
    found = fxport.explain(Returned(*[plain] * LAYERS), IDS)
    assert found.ok and len(found.rewritten) == LAYERS
    assert found.training is not None and found.training.door is Door.TRAINING
    assert [s.outcome is Outcome.LEFT for s in found.training.sites] == [False, True, False, False]
    text = str(found)
    assert "torch.compile: 1 graph, 0 graph breaks; attention 3 of 4, 1 left" in " ".join(
        text.split()
    )
    where = text.index("left by torch.compile:")
    assert f"test_explain.py:{line_of('returned')}" in text[where:]
    json.dumps(found.to_dict())


class Mixing(Model):
    """Two obstacles: an attention that is left, and a mean over all tokens."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1]))
        x = x + x.mean(1, keepdim=True)  # mean
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def test_every_site_of_a_refused_port_is_listed() -> None:
    found = fxport.explain(Mixing(plain, watched, plain, plain))
    assert not found.ok
    assert [s.outcome for s in found.sites] == [
        Outcome.REWRITTEN,
        Outcome.LEFT,
        Outcome.REWRITTEN,
        Outcome.REWRITTEN,
    ]
    lines = [r.location.line for r in found.obstacles if r.location]
    assert line_of("watched") in lines and line_of("mean") in lines
    (table,) = found.positions
    assert "wpe.weight" in table.subject


class Masked(nn.Module):
    """A constant mask, made on a line that is harmless, and what makes it inexpressible."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.wte, self.rel = nn.Embedding(VOCAB, WIDTH), nn.Embedding(LIMIT, HEADS)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(LAYERS))

    def forward(self, ids: Tensor) -> Tensor:
        x, T = self.wte(ids), ids.shape[1]
        mask = torch.zeros(T, T).masked_fill(torch.ones(T, T).triu(1).bool(), float("-inf"))
        for i, layer in enumerate(self.layers):
            here = mask
            if i == 2 and self.kind == "data":
                here = mask - (ids == 0)[:, None, None, :] * 8.0  # padding
            if i == 2 and self.kind == "learned":
                distance = (torch.arange(T)[:, None] - torch.arange(T)).clamp(0, LIMIT - 1)
                bias = self.rel(distance)
                here = mask + bias.permute(2, 0, 1)  # learned
            q, k, v = (heads_of(t) for t in layer(x).chunk(3, dim=-1))
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=here)
            x = x + y.transpose(1, 2).reshape(x.shape)
        return F.linear(x, self.wte.weight)


@pytest.mark.parametrize(
    ("kind", "marker", "code"),
    [
        ("data", "padding", ReasonCode.MASK_DATA_DEPENDENT),
        ("learned", "learned", ReasonCode.UNSUPPORTED_FEATURE),
    ],
)
def test_a_mask_that_serving_cannot_express_names_its_line(
    kind: str, marker: str, code: ReasonCode
) -> None:
    found = fxport.explain(Masked(kind))
    assert len(found.rewritten) == LAYERS  # in training it is
    (reason,) = found.obstacles
    assert reason.code is code and reason.location is not None
    assert reason.location.line == line_of(marker), reason
    with pytest.raises(PortError) as caught:
        fxport.port(Masked(kind))
    assert caught.value.reasons == (reason,)


class DataDependent(Model):
    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids)
        if x.sum() > 1e6:  # branch
            x = x / 2
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def test_a_model_that_cannot_be_captured_has_its_sites_listed() -> None:
    found = fxport.explain(DataDependent(plain, watched, plain, plain))
    assert not found.ok and found.door is Door.SERVING
    assert len(found.rewritten) == 3 and len(found.left) == 1
    assert line_of("branch") in [r.location.line for r in found.obstacles if r.location]


# --- strict, and the warning ------------------------------------------------------------------


def compiled(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend="vllm_generic", options=options)


def test_strict_names_what_is_left() -> None:
    with pytest.raises(PortError) as caught:
        compiled(Model(plain, watched, plain, watched), strict=True)(IDS)
    assert len(caught.value.reasons) == 2
    assert all(r.location.line == line_of("watched") for r in caught.value.reasons if r.location)


def test_a_dense_mask_passes_strict_with_one_warning() -> None:
    model = Model(odd_mask, plain, odd_mask, plain)
    call = compiled(model, strict=True)
    with pytest.warns(FxportWarning) as caught:
        actual = call(IDS)
        call(IDS)
    assert len(caught) == 1
    assert "attention 4 of 4; 2 with a dense mask" in str(caught[0].message)
    torch.testing.assert_close(actual, model(IDS))


def test_one_warning_with_the_summary() -> None:
    call = compiled(Model(plain, watched, plain, watched))
    with pytest.warns(FxportWarning) as caught:
        call(IDS)
    assert len(caught) == 1
    message = str(caught[0].message)
    assert message.startswith("vllm_generic: attention 2 of 4, 2 left: attention weights used")
    assert message.count("    return weights @ v, weights.amax()") == 1


def test_silence_when_all_is_well(capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FxportWarning)
        compiled(Model(*[plain] * LAYERS), strict=True)(IDS)
    captured = capfd.readouterr()
    assert captured.out == "" and "attention" not in captured.err


# --- text and JSON ----------------------------------------------------------------------------


def test_layer_names() -> None:
    assert layer_names([f"blocks.{i}.attn" for i in range(32)]) == "blocks.0..31.attn"
    assert layer_names(["h.0.a", "h.2.a", "h.3.a"]) == "h.0,2..3.a"
    assert layer_names(["attn", "attn"]) == "attn"
    assert layer_names([""]) == ""


def big_explanation() -> Explanation:
    location = Location(
        "/somewhere/deep/in/a/long/path/of/a/package/model.py", 41, "f", "x = " + "y" * 90
    )
    reason = Reason(ReasonCode.MASK_DATA_DEPENDENT, "the mask " * 12, location, "hint " * 30)
    good = [
        Site(Outcome.REWRITTEN, "softmax", "fxport::attention causal, 4 heads", f"b.{i}.attn")
        for i in range(30)
    ]
    bad = [Site(Outcome.LEFT, "softmax", "", f"b.{i}.attn", location, reason) for i in (30, 31)]
    linears = tuple(LinearSite(f"b.{i}.up.weight", "column", "sharded output") for i in range(32))
    return Explanation("Big", Door.SERVING, (*good, *bad), linears, obstacles=(reason,))


def test_the_text_is_folded_and_narrow() -> None:
    found = big_explanation()
    assert found.summary == "attention 30 of 32, 2 left: mask depends on data (model.py:41)"
    text = str(found)
    for folded in ("b.0..29.attn x 30", "b.30..31.attn x 2", "b.0..31.up.weight x 32: column"):
        assert folded in text, text
    assert all(len(line) <= 80 for line in text.splitlines()), text


def test_json() -> None:
    found = big_explanation()
    read = json.loads(json.dumps(found.to_dict()))
    assert read["ok"] is False and read["door"] == "serving" and read["summary"] == found.summary
    assert len(read["sites"]) == 32 and len(read["linears"]) == 32
    assert read["sites"][31]["reason"]["code"] == "mask-depends-on-data"
    assert read["sites"][31]["reason"]["location"]["line"] == 41


def test_public_names() -> None:
    assert fxport.Explanation is Explanation and callable(fxport.explain)
    assert inspect.signature(fxport.explain).return_annotation == "Explanation"
