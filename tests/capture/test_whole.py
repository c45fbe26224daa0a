"""Steps taken in pieces, or for padding too, become steps on the tokens; else they stay."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from fxport.api import port
from fxport.capture.clone import clone_for_capture
from fxport.capture.inputs import InputKind
from fxport.capture.sample import Sample, take_sample
from fxport.capture.whole import make_whole
from fxport.errors import PortError

Step = Callable[["Mixer", Tensor], Tensor]
WIDTH, HEADS = 24, 2


class Mixer(nn.Module):
    """One step between a look-up and the logits, in float64."""

    def __init__(self, step: Step, pad: Callable[[Tensor], Tensor] | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(29, WIDTH)
        self.first, self.second = nn.Linear(WIDTH, 40), nn.Linear(40, WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.register_buffer("tril", torch.ones(99, 99, dtype=torch.bool).tril())
        self.places = nn.Parameter(torch.randn(99, WIDTH))
        self.head = nn.Linear(WIDTH, 29)
        self.step, self.pad = step, pad
        self.double()

    def mlp(self, x: Tensor) -> Tensor:
        return self.second(F.gelu(self.first(self.norm(x))))

    def heads(self, x: Tensor) -> Iterable[Tensor]:
        sizes = (*x.shape[:2], HEADS, -1)
        return (y.view(sizes).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))

    def forward(self, ids: Tensor) -> Tensor:
        length = ids.shape[1]
        if self.pad is not None:
            ids = self.pad(ids)
        return self.head(self.step(self, self.embed(ids)))[:, :length]


def viewed_after_nothing_is_joined(m: Mixer, x: Tensor) -> Tensor:
    """What is joined is laid out row after row, as the view needs it."""
    whole = (torch.cat([y, y[..., y.shape[-1] :]], -1) for y in m.heads(x))
    q, k, v = (y.view(-1, 1, x.shape[1], y.shape[-1]) for y in whole)
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return rejoined(mixed.view(-1, HEADS, *mixed.shape[2:]))


def rejoined(y: Tensor) -> Tensor:
    return y.transpose(1, 2).flatten(2)


def in_pieces(cut: Callable[[Tensor], Any]) -> Step:
    return lambda m, x: torch.cat([m.mlp(part) for part in cut(x)], 1)


def flat(m: Mixer, x: Tensor) -> Tensor:
    rows = x.reshape(-1, WIDTH).split(16)
    return torch.cat([m.mlp(part) for part in rows]).view_as(x)


def by_index(m: Mixer, x: Tensor) -> Tensor:
    return torch.cat([m.mlp(x[:, i : i + 16]) for i in range(0, x.shape[1], 16)], 1)


def beside(m: Mixer, x: Tensor) -> Tensor:
    """Pieces of two values, and of a table."""
    others = (x * 2).split(16, 1)
    places = m.places[: x.shape[1]].split(16)
    pairs = zip(x.split(16, 1), others, places, strict=True)
    return torch.cat([m.mlp(a) * b.sigmoid() + p for a, b, p in pairs], 1)


def rows_of_scores(mask: Callable[[Mixer, int, int, Tensor], Tensor]) -> Step:
    """Queries piece by piece, each with the keys up to its last one."""

    def step(m: Mixer, x: Tensor) -> Tensor:
        q, k, v = m.heads(x)
        length, made = x.shape[1], []
        for i in range(0, length, 16):
            end = min(i + 16, length)
            scores = q[:, :, i:end] @ k[:, :, :end].mT / math.sqrt(q.shape[-1])
            made.append(mask(m, i, end, scores).softmax(-1) @ v[:, :, :end])
        return rejoined(torch.cat(made, 2))

    return step


def by_buffer(m: Mixer, i: int, end: int, scores: Tensor) -> Tensor:
    return scores.masked_fill(~m.tril[i:end, :end], -math.inf)


def by_triangle(m: Mixer, i: int, end: int, scores: Tensor) -> Tensor:
    return scores.masked_fill(torch.ones(end - i, end, dtype=torch.bool).triu(i + 1), -math.inf)


def by_numbers(m: Mixer, i: int, end: int, scores: Tensor) -> Tensor:
    hidden = torch.arange(i, end)[:, None] < torch.arange(end)
    return torch.where(hidden, torch.finfo(scores.dtype).min, scores)


def by_sum(m: Mixer, i: int, end: int, scores: Tensor) -> Tensor:
    added = torch.zeros(99, 99, dtype=scores.dtype).masked_fill(~m.tril, -math.inf)
    return scores + added[i:end, :end]


def einsums(m: Mixer, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    made = []
    for i in range(0, x.shape[1], 16):
        scores = torch.einsum("bhqd,bhkd->bhqk", q[:, :, i : i + 16], k[:, :, : i + 16])
        hidden = ~m.tril[i : i + 16, : i + 16][:, : x.shape[1]][: x.shape[1] - i]
        weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
        made.append(torch.einsum("bhqk,bhkd->bhqd", weights, v[:, :, : i + 16]))
    return rejoined(torch.cat(made, 2))


def torch_rows(m: Mixer, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    mask, made = m.tril[: x.shape[1], : x.shape[1]], []
    for i in range(0, x.shape[1], 16):
        part = k[:, :, : i + 16], v[:, :, : i + 16], mask[i : i + 16, : i + 16]
        made.append(F.scaled_dot_product_attention(q[:, :, i : i + 16], *part))
    return rejoined(torch.cat(made, 2))


def causal(m: Mixer, x: Tensor) -> Tensor:
    return rejoined(F.scaled_dot_product_attention(*m.heads(x), is_causal=True))


def masked(hide: Callable[[Mixer, Tensor], Tensor]) -> Step:
    def step(m: Mixer, x: Tensor) -> Tensor:
        q, k, v = m.heads(x)
        return rejoined(hide(m, q @ k.mT).softmax(-1) @ v)

    return step


def triangle(m: Mixer, scores: Tensor) -> Tensor:
    length = scores.shape[-1]
    return scores.masked_fill(~m.tril[:length, :length], -math.inf)


def at_the_end(ids: Tensor) -> Tensor:
    return F.pad(ids, (0, -ids.shape[1] % 16), value=3)


def by_joining(ids: Tensor) -> Tensor:
    return torch.cat([ids, ids.new_zeros(ids.shape[0], -ids.shape[1] % 16)], 1)


WHOLE: dict[str, tuple[Step, Callable[[Tensor], Tensor] | None]] = {
    "split": (in_pieces(lambda x: x.split(16, 1)), None),
    "sizes": (in_pieces(lambda x: x.split([x.shape[1] - 2, 2], 1)), None),
    "chunk": (in_pieces(lambda x: x.chunk(3, 1)), None),
    "tensor_split": (in_pieces(lambda x: torch.tensor_split(x, 3, 1)), None),
    "flat": (flat, None),
    "by index": (by_index, None),
    "beside": (beside, None),
    "nothing joined": (viewed_after_nothing_is_joined, None),
    "twice": (lambda m, x: by_index(m, flat(m, x)), None),
    "rows, buffer": (rows_of_scores(by_buffer), None),
    "rows, triangle": (rows_of_scores(by_triangle), None),
    "rows, numbers": (rows_of_scores(by_numbers), None),
    "rows, sum": (rows_of_scores(by_sum), None),
    "rows, einsum": (einsums, None),
    "rows, torch's attention": (torch_rows, None),
    "padded, torch's attention": (causal, at_the_end),
    "padded by joining": (causal, by_joining),
    "padded, mask": (masked(triangle), at_the_end),
    "padded, places": (lambda m, x: causal(m, x + m.places[: x.shape[1]]), at_the_end),
    "padded, in pieces": (by_index, at_the_end),
    "padded, rows": (rows_of_scores(by_buffer), at_the_end),
}


def sample_of(step: Step, pad: Callable[[Tensor], Tensor] | None, length: int) -> Sample:
    return take_sample(clone_for_capture(Mixer(step, pad).eval()), 2, length)


def run(sample: Sample, model: nn.Module, ids: Tensor) -> Tensor:
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    inputs = [n.meta["input"] for n in sample.graph.graph.find_nodes(op="placeholder")]
    given = [ids if i.kind is InputKind.DATA else own.get(i.name, i.value) for i in inputs]
    found: Tensor = sample.graph(*given)
    return found


def shape_of_graph(sample: Sample) -> list[Any]:
    return [node.target for node in sample.varying if node.op == "call_function"]


@pytest.mark.parametrize("name", WHOLE)
def test_it_is_one_graph_for_every_length_with_the_same_numbers(name: str) -> None:
    model = Mixer(*WHOLE[name]).eval()
    shapes = []
    for length in (5, 16, 37):
        sample = take_sample(clone_for_capture(model), 2, length)
        shapes.append(shape_of_graph(sample))
        ids = torch.randint(0, 29, (2, length))
        with torch.no_grad():
            torch.testing.assert_close(run(sample, model, ids), model(ids), rtol=1e-9, atol=1e-12)
    assert shapes[0] == shapes[1] == shapes[2]
    assert not any("cat" in str(target) or "pad" in str(target) for target in shapes[0])


def mean_of_piece(m: Mixer, x: Tensor) -> Tensor:
    return torch.cat([m.mlp(part) + part.mean(1, keepdim=True) for part in x.split(16, 1)], 1)


def in_blocks(m: Mixer, x: Tensor) -> Tensor:
    """Of 16 tokens: there are no such of 37."""
    return m.mlp(x).unflatten(1, (-1, 16)).cumsum(2).flatten(1, 2)


def in_pieces_after_nothing(m: Mixer, x: Tensor) -> Tensor:
    """Torch takes an empty vector for nothing of any shape."""
    return torch.cat([x.new_zeros(0), *(m.mlp(part) for part in x.split(16, 1))], 1)


def place_in_piece(m: Mixer, x: Tensor) -> Tensor:
    parts = x.split(16, 1)
    return torch.cat([m.mlp(part) + m.places[: part.shape[1]] for part in parts], 1)


def turned(m: Mixer, x: Tensor) -> Tensor:
    return torch.cat([m.mlp(part) for part in reversed(x.split(16, 1))], 1)


def overlapping(m: Mixer, x: Tensor) -> Tensor:
    parts = [x[:, max(i - 1, 0) : i + 16] for i in range(0, x.shape[1], 16)]
    return torch.cat([m.mlp(part) for part in parts], 1)[:, : x.shape[1]]


def numbered(m: Mixer, x: Tensor) -> Tensor:
    return torch.cat([m.mlp(part) * (i + 1) for i, part in enumerate(x.split(16, 1))], 1)


def sums(m: Mixer, x: Tensor) -> Tensor:
    return torch.cat([m.mlp(part.cumsum(1)) for part in x.split(16, 1)], 1)


def whole_blocks(m: Mixer, i: int, end: int, scores: Tensor) -> Tensor:
    return scores


def softened(m: Mixer, i: int, end: int, scores: Tensor) -> Tensor:
    """Hidden by a number that leaves some weight."""
    return scores.masked_fill(~m.tril[i:end, :end], -8.0)


def everything(m: Mixer, scores: Tensor) -> Tensor:
    return scores


def hides_little(m: Mixer, scores: Tensor) -> Tensor:
    """Two later keys are seen."""
    length = scores.shape[-1]
    return scores.masked_fill(torch.ones(length, length).triu(3) > 0, -math.inf)


def in_front(ids: Tensor) -> Tensor:
    return F.pad(ids, (-ids.shape[1] % 16, 0))


def both_ends(ids: Tensor) -> Tensor:
    return F.pad(ids, (1, -(ids.shape[1] + 1) % 16))


def around(ids: Tensor) -> Tensor:
    return torch.cat([ids, ids[:, : -ids.shape[1] % 16]], 1)


def written_over(m: Mixer, scores: Tensor) -> Tensor:
    """What was hidden is given another score."""
    length = scores.shape[-1]
    last = torch.arange(length) == length - 1
    return triangle(m, scores).masked_fill(last, 0.0)


def all_lowered(m: Mixer, scores: Tensor) -> Tensor:
    """Where nothing is left, a finite number hides nothing."""
    scores = scores.masked_fill(m.tril[: scores.shape[-1], : scores.shape[-1]], -math.inf)
    return scores.masked_fill(~m.tril[: scores.shape[-1], : scores.shape[-1]], -1e30)


def filled_in_place(m: Mixer, scores: Tensor) -> Tensor:
    hidden = ~m.tril[: scores.shape[-1], : scores.shape[-1]]
    hidden[:, -1] = False
    return scores.masked_fill(hidden, -math.inf)


MIXED: dict[str, tuple[Step, Callable[[Tensor], Tensor] | None]] = {
    "mean of a piece": (mean_of_piece, None),
    "place in a piece": (place_in_piece, None),
    "turned": (turned, None),
    "overlapping": (overlapping, None),
    "numbered": (numbered, None),
    "sums": (sums, None),
    "rows, whole blocks": (rows_of_scores(whole_blocks), None),
    "rows, softened": (rows_of_scores(softened), None),
    "padded in front": (causal, in_front),
    "padded at both ends": (causal, both_ends),
    "padded, every key seen": (masked(everything), at_the_end),
    "padded, two later keys": (masked(hides_little), at_the_end),
    "padded, written over": (masked(written_over), at_the_end),
    "padded, all lowered": (masked(all_lowered), at_the_end),
    "padded, filled in place": (masked(filled_in_place), at_the_end),
    "padded, mean": (lambda m, x: x + x.mean(1, keepdim=True), at_the_end),
    "padded, turned": (lambda m, x: x.flip(1), at_the_end),
    "padded, last": (lambda m, x: x + x[:, -1:], at_the_end),
    "padded, in blocks": (in_blocks, at_the_end),
    "an empty vector": (in_pieces_after_nothing, None),
    "padded, of both rows": (lambda m, x: x.flatten(0, 1).cumsum(0).view_as(x), at_the_end),
}


@pytest.mark.parametrize("name", MIXED)
def test_what_mixes_stays_as_it_is(name: str) -> None:
    model = Mixer(*MIXED[name]).eval()
    sample = take_sample(clone_for_capture(model), 2, 37)
    ids = torch.randint(0, 29, (2, 37))
    with torch.no_grad():
        torch.testing.assert_close(run(sample, model, ids), model(ids), rtol=1e-9, atol=1e-12)
    kept = [str(target) for target in shape_of_graph(sample)]
    assert any("cat" in target or "pad" in target for target in kept)


def test_padding_with_tokens_that_are_there_is_left_out_where_nobody_sees_them() -> None:
    model = Mixer(causal, around).eval()
    sample = take_sample(clone_for_capture(model), 2, 29)
    assert not any("cat" in str(target) for target in shape_of_graph(sample))
    ids = torch.randint(0, 29, (2, 29))
    with torch.no_grad():
        torch.testing.assert_close(run(sample, model, ids), model(ids), rtol=1e-9, atol=1e-12)


def test_a_piece_that_is_written_to_stays() -> None:
    def step(m: Mixer, x: Tensor) -> Tensor:
        parts = [part.clone() for part in x.split(16, 1)]
        for number, part in enumerate(parts):
            part.mul_(number + 1)
        return torch.cat(parts, 1)

    assert any("cat" in str(target) for target in shape_of_graph(sample_of(step, None, 37)))


def test_a_graph_with_sizes_that_only_the_data_know_stays() -> None:
    def step(x: Tensor) -> Tensor:
        found = x.nonzero()
        return torch.cat([found, found], 0)

    gm = make_fx(step, tracing_mode="symbolic")(torch.arange(37))
    before = [str(node) for node in gm.graph.nodes]
    make_whole(gm, 2, 37)
    assert [str(node) for node in gm.graph.nodes] == before


# --- whole models ---------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, attend: Step) -> None:
        super().__init__()
        self.qkv, self.norm = nn.Linear(64, 192), nn.LayerNorm(64)
        self.first, self.second = nn.Linear(64, 128), nn.Linear(128, 64)
        self.attend = attend

    def heads(self, x: Tensor) -> Iterable[Tensor]:
        sizes = (*x.shape[:2], HEADS, -1)
        return (y.view(sizes).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self, x)  # type: ignore[arg-type]
        parts = self.norm(x).split(48, 1)
        return x + torch.cat([self.second(F.gelu(self.first(part))) for part in parts], 1)


class Chunked(nn.Module):
    """Padded to a multiple of 16, queries and feed-forward in pieces of 48."""

    def __init__(self, attend: Step, pad: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.places = nn.Embedding(97, 64), nn.Embedding(64, 64)
        self.blocks = nn.ModuleList(Block(attend) for _ in range(1))
        self.norm, self.head = nn.LayerNorm(64), nn.Linear(64, 97)
        self.pad = pad

    def forward(self, ids: Tensor) -> Tensor:
        length = ids.shape[1]
        ids = self.pad(ids)
        x = self.embed(ids) + self.places(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))[:, :length]


def queries(hides: bool) -> Step:
    def step(m: Any, x: Tensor) -> Tensor:
        q, k, v = m.heads(x)
        made = []
        for i in range(0, x.shape[1], 48):
            end = min(i + 48, x.shape[1])
            scores = q[:, :, i:end] @ k[:, :, :end].mT / math.sqrt(q.shape[-1])
            if hides:
                hidden = torch.arange(i, end)[:, None] < torch.arange(end)
                scores = scores.masked_fill(hidden, -math.inf)
            made.append(scores.softmax(-1) @ v[:, :, :end])
        return rejoined(torch.cat(made, 2))

    return step


def test_a_model_in_pieces_and_padded_is_ported() -> None:
    found = port(Chunked(queries(hides=True), at_the_end), max_seq_len=64)
    assert found.half is not None
    targets = {n.target for n in found.serving.body.graph.nodes if n.op == "call_function"}
    assert torch.ops.fxport.attention.default in targets
    assert not any("softmax" in str(target) or "cat" in str(target) for target in targets)
    check = next(d for d in found.report.decisions if d.subject == "logits on random tokens")
    assert " 49, " in check.detail


def test_blocks_that_see_themselves_whole_are_refused() -> None:
    with pytest.raises(PortError) as refused:
        port(Chunked(queries(hides=False), at_the_end), max_seq_len=64)
    reason = refused.value.reasons[0]
    assert reason.location is not None and reason.location.file == __file__
