"""Masks too large to be made, looked at where their lines meet: that says all there is to say."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from attention_graphs import Site, compare, rewrite, trace_directly, trace_training
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_rules import Rule, example, site
from spellings_base import finish, heads_first
from torch import Tensor

import fxport.passes.masks.prover as prover
from fxport.passes.masks.bands import Band
from fxport.passes.masks.landmarks import landmarks_of

# -- the claim: masks that are alike at the places are alike everywhere ----------------------------


@dataclass(frozen=True)
class Atom:
    """One comparison of positions; `block` divides them."""

    form: str
    number: int
    compared: str
    block: int

    def __call__(self, i: Tensor, j: Tensor) -> Tensor:
        n, c = self.number, self.block
        if self.form == "triangle":
            ones = torch.ones(i.size(0), j.size(1))
            return (ones.tril(n) if self.compared == "<=" else ones.triu(n)) > 0
        value = {
            "row": lambda: i,
            "column": lambda: 3 - j,
            "distance": lambda: i - j,
            "shifted": lambda: (j + 5) - (i - 2),
            "size": lambda: (i - j).abs(),
            "clamped": lambda: (i - j).clamp(max=9),
            "blocks": lambda: i // c - j // c,
            "shifted blocks": lambda: (i + 6) // c - (j + 1) // c,
            "start": lambda: j - i // c * c,
            "rest": lambda: i - j - i % c,
            "rests": lambda: i % c - j % c,
        }[self.form]()
        return {"<=": value <= n, ">": value > n, "==": value == n}[self.compared]


FORMS = ("row", "column", "distance", "shifted", "size", "clamped", "triangle")
BLOCKS = ("blocks", "shifted blocks", "start", "rest", "rests")


@st.composite
def rules(draw: st.DrawFn, block: int, forms: tuple[str, ...]) -> Rule:
    atoms = [
        Atom(
            draw(st.sampled_from(forms)),
            draw(st.integers(-12, 24)),
            draw(st.sampled_from(("<=", ">", "=="))),
            block,
        )
        for _ in range(draw(st.integers(1, 4)))
    ]
    ways = [draw(st.sampled_from("&|^~")) for _ in atoms]

    def rule(i: Tensor, j: Tensor) -> Tensor:
        found = atoms[0](i, j)
        for atom, way in zip(atoms[1:], ways[1:], strict=True):
            other = atom(i, j)
            found = {
                "&": found & other,
                "|": found | other,
                "^": found ^ other,
                "~": ~found & other,
            }[way]
        return found

    return rule


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Rule, Rule, int]:
    block = draw(st.integers(5, 15))
    forms = FORMS + (BLOCKS if draw(st.booleans()) else ())
    one, other = draw(rules(block, forms)), draw(rules(block, forms))
    change = draw(rules(block, forms))
    kind = draw(st.sampled_from(("other", "meet", "join")))
    if kind == "meet":  # often the same, or nearly so
        return one, lambda i, j: one(i, j) & (change(i, j) | (j <= i + 3)), 0
    if kind == "join":
        return one, lambda i, j: one(i, j) | (change(i, j) & (i - j > 40)), 0
    return one, other, 0


@settings(max_examples=60, deadline=None)
@given(pair=pairs(), length=st.integers(44, 90), plain=st.booleans())
def test_masks_alike_at_the_places_are_alike(
    pair: tuple[Rule, Rule, int], length: int, plain: bool
) -> None:
    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        t = torch.arange(x.size(0))
        return pair[0](t[:, None], t[None, :]), pair[1](t[:, None], t[None, :])

    data = torch.zeros(length)
    graph = trace_directly(Site(both), [data], {} if plain else {0: (0,)})
    (source,) = graph.graph.find_nodes(op="placeholder")
    size = length if plain else source.meta["val"].shape[0].node.expr
    masks = list(graph.graph.output_node().args[0])  # type: ignore[arg-type]
    marks = landmarks_of(masks, (size, size), {} if plain else {size: length})
    assert marks is not None
    values = both(data)
    for node, whole in zip(masks, values, strict=True):
        n = len(marks.places)
        seen = marks.value(node).expand(n, n)
        assert torch.equal(seen, whole.expand(length, length)[marks.places][:, marks.places])
    alike = torch.equal(marks.value(masks[0]).expand(n, n), marks.value(masks[1]).expand(n, n))
    assert alike == bool((values[0] == values[1]).all())


# -- what is proven so -----------------------------------------------------------------------------


def window(i: Tensor, j: Tensor) -> Tensor:
    return (j <= i) & (i - j < 12)


def window_in_numbers(i: Tensor, j: Tensor) -> Tensor:
    return torch.where((i >= j) * (j + 12 > i), 0.0, float("-inf")) == 0


def triangles(i: Tensor, j: Tensor) -> Tensor:
    ones = torch.ones(i.size(0), j.size(1), dtype=torch.bool)
    return ones.tril() & ones.triu(-11)


def clamped(i: Tensor, j: Tensor) -> Tensor:
    return ((i - j).clamp(min=-1, max=20) < 12) & ((j - i).clamp(max=3) <= 0)


def chunks(i: Tensor, j: Tensor) -> Tensor:
    return (i // 8 == j // 8) & (j <= i)


def chunks_from_the_start(i: Tensor, j: Tensor) -> Tensor:
    return (j <= i) & (j >= i // 8 * 8)


def expanded(i: Tensor, j: Tensor) -> Tensor:
    n = i.size(0)
    row, column = i.expand(n, n), j.expand(n, n)
    return (column <= row) & (row - column < 12)


PROVEN: tuple[tuple[Rule, str], ...] = (
    (window, "causal, window 12"),
    (window_in_numbers, "causal, window 12"),
    (triangles, "causal, window 12"),
    (clamped, "causal, window 12"),
    (expanded, "causal, window 12"),
    (lambda i, j: (j <= i) & (i - j <= i % 8), "causal, chunks of 8"),
    (lambda i, j: (i - j).abs() < 5, "window from -4 to 4"),
    (lambda i, j: ~(j > i), "causal"),
    (chunks, "causal, chunks of 8"),
    (chunks_from_the_start, "causal, chunks of 8"),
    (lambda i, j: i // 8 == j // 8, "full, chunks of 8"),
)


def one_key_more(i: Tensor, j: Tensor) -> Tensor:
    return window(i, j) | ((i == 31) & (j == 17))


def prefix(i: Tensor, j: Tensor) -> Tensor:
    return window(i, j) | (j < 2)


def other_far_out(i: Tensor, j: Tensor) -> Tensor:
    return (j <= i) & ((i - j < 12) | (i > 37))


def chunk_with_a_key_more(i: Tensor, j: Tensor) -> Tensor:
    return chunks(i, j) | ((i == 25) & (j == 23))


def shifted_chunks(i: Tensor, j: Tensor) -> Tensor:
    return ((i + 1) // 8 == (j + 1) // 8) & (j <= i)


def sums(i: Tensor, j: Tensor) -> Tensor:
    return (j <= i) & (i + j < 4000)


def sums_by_differences(i: Tensor, j: Tensor) -> Tensor:
    return (j <= i) & (i - (3 - j) < 60)


def twice(i: Tensor, j: Tensor) -> Tensor:
    return j <= 2 * i


def by_table(i: Tensor, j: Tensor) -> Tensor:
    return (j <= i) & (torch.arange(200)[: j.size(1)] != 100)


def every_third(i: Tensor, j: Tensor) -> Tensor:
    return (j <= i) & ((i - j) % 3 == 0)


NOT_PROVEN = (
    one_key_more, prefix, other_far_out, chunk_with_a_key_more, shifted_chunks, sums,
    sums_by_differences, twice,
    by_table, every_third,
)  # fmt: skip


@pytest.mark.parametrize("rule", [sums, sums_by_differences, twice, every_third])
def test_what_has_other_lines_has_no_landmarks(rule: Rule) -> None:
    graph = trace_directly(Site(lambda x: rule(*_grid(x))), [torch.zeros(50)])
    (mask,) = graph.graph.output_node().args
    assert landmarks_of([mask], (50, 50), {}) is None  # type: ignore[list-item]


def test_numbers_that_are_the_mask_have_no_landmarks() -> None:
    """Where it is 0 lies between the lines that are known: at the places it is 1 all over."""

    def strip(i: Tensor, j: Tensor) -> Tensor:
        return ((i - j - 25).abs() - 2).clamp(min=0, max=1)

    graph = trace_directly(Site(lambda x: strip(*_grid(x))), [torch.zeros(90)])
    (mask,) = graph.graph.output_node().args
    assert landmarks_of([mask], (90, 90), {}) is None  # type: ignore[list-item]


@pytest.fixture
def too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every mask."""
    monkeypatch.setattr(prover, "MAX_ENTRIES", 1)


@pytest.mark.usefixtures("too_large")
@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize(("rule", "words"), PROVEN)
def test_proven(rule: Rule, words: str, dynamic: bool) -> None:
    module = site(rule)
    found = rewrite(trace_directly(module, [example(2, 43)], {0: (1, 2)} if dynamic else {}))
    assert [s.mask for s in found.result.sites] == [words]
    for length in (3, 43, 61) if dynamic else (43,):
        compare(module, found.graph, [example(2, length)])


@pytest.mark.usefixtures("too_large")
@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("rule", NOT_PROVEN)
def test_not_proven(rule: Rule, dynamic: bool) -> None:
    module = site(rule)
    found = rewrite(trace_directly(module, [example(2, 43)], {0: (1, 2)} if dynamic else {}))
    assert [(s.mask, s.bias) for s in found.result.sites] in ([], [("full", "constant")])
    for length in (3, 43, 131) if dynamic else (43,):
        compare(module, found.graph, [example(1 if dynamic else 2, length)])


@pytest.mark.usefixtures("too_large")
def test_a_bias_is_not_looked_at_so() -> None:
    def biased(i: Tensor, j: Tensor) -> Tensor:
        return torch.where(j <= i, (j - i) * 0.25, float("-inf"))

    def masked(qkv: Tensor) -> Tensor:
        q, k, v = heads_first(qkv)
        t = torch.arange(q.size(2))
        return finish((q @ k.mT + biased(t[:, None], t[None, :])).softmax(-1), v)

    found = rewrite(trace_directly(Site(masked), [example(2, 43)], {0: (1, 2)}))
    assert not found.result.sites or found.result.sites[0].bias
    compare(Site(masked), found.graph, [example(2, 19)])


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (lambda i, j: (j <= i) & (i - j < 262144), "causal, window 262144"),
        (lambda i, j: (j <= i) & (i // 8192 == j // 8192), "causal, chunks of 8192"),
    ],
)
def test_windows_and_chunks_of_real_models(rule: Rule, words: str) -> None:
    module = site(rule)
    found = rewrite(trace_directly(module, [example(2, 19)], {0: (1, 2)}))
    assert [s.mask for s in found.result.sites] == [words]
    compare(module, found.graph, [example(2, 23)])


def test_long_sequences_of_plain_length() -> None:
    """The mask of 16,384 tokens is not made, and does not stay in the graph."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        t = torch.arange(q.size(2))
        s = F.scaled_dot_product_attention
        allowed = (t[None, :] <= t[:, None]) & (t[:, None] - t[None, :] < 4096)
        return s(q, k, v, attn_mask=allowed)

    data = [torch.randn(1, 1, 16384, 8) for _ in range(3)]
    found = rewrite(trace_training(Site(function), data))
    assert [s.mask for s in found.result.sites] == ["causal, window 4096"]
    names = [str(n.target) for n in found.graph.graph.nodes if n.op == "call_function"]
    assert not any("arange" in name for name in names)


def test_bands_whose_edges_are_elsewhere_are_not_told() -> None:
    graph = trace_directly(Site(lambda x: window(*_grid(x))), [torch.zeros(50)])
    (mask,) = graph.graph.output_node().args
    marks = landmarks_of([mask], (50, 50), {})  # type: ignore[list-item]
    assert marks is not None
    assert marks.tell(Band(-11, 0))
    assert not marks.tell(Band(-7, 0))
    assert not marks.tell(Band(None, 0, chunk=10))


def _grid(x: Tensor) -> tuple[Tensor, Tensor]:
    t = torch.arange(x.size(0))
    return t[:, None], t[None, :]
