"""The lines along which a mask changes: nothing of it changes anywhere else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from attention_graphs import Site, trace_directly
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_rules import Rule
from torch import Tensor, fx

from fxport.passes.attention.made import filled_with
from fxport.passes.graph_facts import reachable
from fxport.passes.masks.landmarks import landmarks_of
from fxport.passes.masks.lines import Lines, lines_of

# -- numbers made of positions, step by step, in ways that are known and others --------------------

DTYPES = (
    torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8, torch.bool,
    torch.float32, torch.float64, torch.float16, torch.bfloat16,
)  # fmt: skip

Step = Callable[[Tensor, float, int], Tensor]

STEPS: dict[str, Step] = {
    "more": lambda x, n, c: x + n,
    "from": lambda x, n, c: n - x,
    "size": lambda x, n, c: x.abs(),
    "at most": lambda x, n, c: x.clamp(max=n),
    "at least": lambda x, n, c: x.clamp(min=n),
    "positive": lambda x, n, c: torch.relu(x),
    "block": lambda x, n, c: x // c,
    "rest": lambda x, n, c: x % c,
    "first of block": lambda x, n, c: x // c * c,
    "blocks on": lambda x, n, c: (x // c + n) * c,
    "few blocks": lambda x, n, c: (x // c).clamp(max=n) * c,
    "floor": lambda x, n, c: torch.div(x, c, rounding_mode="floor"),
    "toward zero": lambda x, n, c: torch.div(x, c, rounding_mode="trunc"),
    "scaled": lambda x, n, c: x / 2.0,
    "times": lambda x, n, c: x * n,
    "whole": lambda x, n, c: x.long(),
    "narrow": lambda x, n, c: x.to(torch.uint8),
    "half": lambda x, n, c: x.to(torch.float16),
    "single": lambda x, n, c: x.float(),
    "rounded": lambda x, n, c: x.float().round(),
    "square": lambda x, n, c: x * x,
    "flag": lambda x, n, c: x.bool().float(),
    "all over": lambda x, n, c: x.expand(max(x.shape), max(x.shape)),
    "turned": lambda x, n, c: x.mT,
}
STARTS: dict[str, Rule] = {
    "row": lambda i, j: i,
    "column": lambda i, j: j,
    "distance": lambda i, j: i - j,
    "sum": lambda i, j: i + j,
    "from the end": lambda i, j: i.size(0) - 1 - j,
    "by halves": lambda i, j: torch.arange(0, i.size(0) / 2, 0.5)[:, None],
    "from 3": lambda i, j: torch.arange(3, i.size(0) + 3)[None],
}


@dataclass(frozen=True)
class Atom:
    """A number made of positions, compared with another one, or with a number in a tensor."""

    start: str
    steps: tuple[tuple[str, float], ...]
    compared: str
    number: float
    held: torch.dtype | None
    other: str | None
    block: int

    def __call__(self, i: Tensor, j: Tensor) -> Tensor:
        value = STARTS[self.start](i, j)
        for name, number in self.steps:
            value = STEPS[name](value, number, self.block)
        limit: Tensor | float = self.number
        if self.other is not None:
            limit = STARTS[self.other](i, j)
        elif self.held is not None:
            limit = torch.full((1, 1), self.number).to(self.held)
        return {"<=": value <= limit, ">": value > limit, "==": value == limit}[self.compared]


NUMBERS = st.one_of(
    st.integers(-12, 30), st.sampled_from((0.5, -0.5, 2.5, 7.25, -300, 300, 1000000))
)


@st.composite
def atoms(draw: st.DrawFn, block: int) -> Atom:
    known = st.sampled_from(sorted(STEPS))
    return Atom(
        draw(st.sampled_from(sorted(STARTS))),
        tuple(draw(st.lists(st.tuples(known, NUMBERS), max_size=3))),
        draw(st.sampled_from(("<=", ">", "=="))),
        draw(NUMBERS),
        draw(st.sampled_from((None, *DTYPES))),
        draw(st.sampled_from((None, None, None, *STARTS))),
        block,
    )


@dataclass(frozen=True)
class Joined:
    parts: tuple[Atom, ...]
    ways: tuple[str, ...]

    def __call__(self, i: Tensor, j: Tensor) -> Tensor:
        found = self.parts[0](i, j)
        for part, way in zip(self.parts[1:], self.ways, strict=False):
            other = part(i, j)
            found = {
                "&": found & other,
                "|": found | other,
                "^": found ^ other,
                "+": found.float() + other.float() * 2 != 2,
            }[way]
        return found


@st.composite
def rules(draw: st.DrawFn) -> Joined:
    block = draw(st.integers(5, 15))
    parts = draw(st.lists(atoms(block), min_size=1, max_size=2))
    return Joined(tuple(parts), tuple(draw(st.sampled_from("&|^+")) for _ in parts))


# -- the claim -------------------------------------------------------------------------------------


def _traced(rule: Rule, length: int, plain: bool) -> tuple[fx.Node, object]:
    def whole(x: Tensor) -> Tensor:
        t = torch.arange(x.size(0))
        return rule(t[:, None], t[None, :])

    graph = trace_directly(Site(whole), [torch.zeros(length)], {} if plain else {0: (0,)})
    (source,) = graph.graph.find_nodes(op="placeholder")
    (mask,) = graph.graph.output_node().args
    assert isinstance(mask, fx.Node)
    return mask, length if plain else source.meta["val"].shape[0].node.expr


def _pieces(lines: Lines, length: int) -> Tensor:
    """For each entry a number of the piece that the lines put it into, or of the line it is on."""
    near = {s * n for n in lines.offsets | {length - 1} for s in (-1, 1)}
    if lines.block:
        blocks = range(-length // lines.block - 1, length // lines.block + 2)
        near = {n % lines.block + k * lines.block for n in near for k in blocks}
    at = torch.tensor(sorted(near))

    def side(x: Tensor) -> Tensor:
        return torch.searchsorted(at, x) + torch.searchsorted(at, x, right=True)

    t = torch.arange(length)
    rank, far = side(t), 2 * len(at) + 2
    distance = side((t[:, None] - t).contiguous())
    return (rank[:, None] * far + rank) * far + distance


@settings(max_examples=40, deadline=None)
@given(rule=rules(), length=st.sampled_from((47, 90)), plain=st.booleans())
def test_a_mask_changes_along_its_lines_alone(rule: Rule, length: int, plain: bool) -> None:
    t = torch.arange(length)
    try:
        real = rule(t[:, None], t[None, :]).expand(length, length)
        mask, size = _traced(rule, length, plain)
    except (RuntimeError, NotImplementedError):  # no operation of torch on such numbers
        return
    sizes = {} if plain else {size: length}
    inputs = [n for n in reachable([mask]) if isinstance(n.meta.get("val"), Tensor)]
    lines = lines_of([mask], inputs, size, length)  # type: ignore[arg-type]
    marks = landmarks_of([mask], (size, size), sizes)  # type: ignore[arg-type]
    if lines is None or marks is None:
        return
    try:
        value = marks.value(mask)
    except ValueError:  # an operation that is not followed
        return
    n = len(marks.places)
    assert torch.equal(value.expand(n, n), real[marks.places][:, marks.places])
    _, piece = _pieces(lines, length).flatten().unique(return_inverse=True)
    seen, count = real.flatten().long(), int(piece.max()) + 1
    allowed = torch.zeros(count, dtype=torch.long).index_add_(0, piece, seen)
    entries = torch.bincount(piece, minlength=count)
    assert bool(((allowed == 0) | (allowed == entries)).all()), "it changes within a piece"
    at = piece.view(length, length)[marks.places][:, marks.places]
    assert len(at.unique()) == count, "some piece is not looked at"


# -- what was once taken for something else --------------------------------------------------------


def between_blocks(i: Tensor, j: Tensor) -> Tensor:
    return j <= (i // 8 + 0.5) * 8


def up_to_half_a_block(i: Tensor, j: Tensor) -> Tensor:
    return j <= (i // 8).clamp(max=2.5) * 8


def compared_in_half(i: Tensor, j: Tensor) -> Tensor:
    return i - j != torch.full((1, 1), 3000.0, dtype=torch.float16)


def beyond_what_single_tells_apart(i: Tensor, j: Tensor) -> Tensor:
    return (i + 2**30) - j > 2**30 + 0.5


@pytest.mark.parametrize(
    "rule",
    [between_blocks, up_to_half_a_block, compared_in_half, beyond_what_single_tells_apart],
)
@pytest.mark.parametrize("plain", [True, False])
def test_what_is_no_line_at_a_whole_number_is_not_known(rule: Rule, plain: bool) -> None:
    mask, size = _traced(rule, 90, plain)
    assert landmarks_of([mask], (size, size), {} if plain else {size: 90}) is None  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("made", "number"),
    [
        (lambda: torch.full((1, 1), 300).to(torch.uint8), None),
        (lambda: torch.full((1, 1), 44.7).to(torch.uint8), 44),
        (lambda: torch.full((1, 1), -2.7).long(), -2),
        (lambda: torch.full((1, 1), 7).bool(), 1),
        (lambda: torch.full((1, 1), 7).bool().long(), 1),
        (lambda: torch.full((1, 1), 2051).half(), 2052),
        (lambda: torch.full((1, 1), -1e9).half(), float("-inf")),
        (lambda: torch.full((1, 1), float("-inf")).long(), None),
        (lambda: torch.ones(1, 1, dtype=torch.uint8) * 300, None),
        (lambda: torch.full((1, 1), 12), 12),
    ],
)
def test_a_number_is_what_its_dtype_makes_of_it(
    made: Callable[[], Tensor], number: float | None
) -> None:
    graph = trace_directly(Site(lambda x: made() + x), [torch.zeros(1, 1)])
    (add,) = (n for n in graph.graph.nodes if n.op == "call_function" and "add" in str(n.target))
    assert filled_with(add.args[0]) == number
