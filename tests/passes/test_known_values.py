"""Values that are one number for every size are replaced; almost such values stay."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from attention_graphs import Site, compare, run_like, trace_directly, trace_training
from torch import Tensor

from fxport.capture.inputs import GraphInput, InputKind
from fxport.capture.memory import is_mutation
from fxport.passes.affine import Affine, stored_value
from fxport.passes.attention.rewrite import rewrite_attention
from fxport.passes.known_values import fold_known_values

HEADS, SIZE = 3, 6
aten = torch.ops.aten


def documents(positions: Tensor, first: Tensor) -> Tensor:
    """Which document each token is in, if positions start anew in each; ``[B, T]``."""
    return (torch.diff(positions, prepend=first, dim=-1) != 1).cumsum(-1)


def positions(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1]).unsqueeze(0).expand(x.shape[0], -1)


def same_document(x: Tensor, found: Tensor) -> Tensor:
    b = torch.arange(x.shape[0])[:, None, None, None]
    i = torch.arange(x.shape[1])
    return found[b, i[None, None, :, None]] == found[b, i[None, None, None, :]]


def none_at_all(x: Tensor) -> Tensor:
    p = positions(x)
    return same_document(x, documents(p, p[:, :1] - 1))


def every_second(x: Tensor) -> Tensor:
    p = positions(x) * 1 + positions(x)  # steps of two: every token begins a document
    return same_document(x, documents(p, p[:, :1] - 2))


def begins_late(x: Tensor) -> Tensor:
    p = positions(x)
    return same_document(x, documents(p, p[:, :1] - 3)) | (p[:, None, :, None] > 10**6)


def by_halves(x: Tensor) -> Tensor:
    p = positions(x) // 8
    return same_document(x, documents(p, p[:, :1] - 1))


def attend(mask: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def function(x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = x.view(b, t, 3, HEADS, SIZE).permute(2, 0, 3, 1, 4)
        i = torch.arange(t)
        allowed = mask(x) & (i[None, :] <= i[:, None])
        scores = torch.where(allowed, q @ k.mT * 0.4, torch.finfo(x.dtype).min)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)

    return function


def traced(mask: Callable[[Tensor], Tensor]):
    torch.manual_seed(4)
    site = Site(attend(mask))
    data = [torch.randn(2, 21, 3 * HEADS * SIZE, dtype=torch.float64)]
    return site, data, trace_directly(site, data, {0: (0, 1)})


def count(graph: torch.fx.GraphModule, packet: torch._ops.OpOverloadPacket) -> int:
    return sum(
        isinstance(n.target, torch._ops.OpOverload) and n.target.overloadpacket is packet
        for n in graph.graph.nodes
    )


def test_a_question_about_documents_that_cannot_be_goes_away():
    site, data, graph = traced(none_at_all)
    assert (count(graph, aten.index), count(graph, aten.diff), count(graph, aten.cumsum)) == (
        2,
        1,
        1,
    )
    assert rewritten_as(graph, folded=True) == ["causal"]
    assert (count(graph, aten.index), count(graph, aten.diff), count(graph, aten.cumsum)) == (
        0,
        0,
        0,
    )
    compare(site, graph, data, 1e-9)
    for batch, length in ((1, 5), (5, 5), (3, 64)):
        more = [torch.randn(batch, length, 3 * HEADS * SIZE, dtype=torch.float64)]
        compare(site, graph, more, 1e-9)


def rewritten_as(graph: torch.fx.GraphModule, folded: bool) -> list[str]:
    assert (fold_known_values(graph) > 0) == folded
    return [site.mask for site in rewrite_attention(graph).sites]


def test_without_this_pass_the_mask_is_not_proven():
    _, _, graph = traced(none_at_all)
    assert [site.mask for site in rewrite_attention(graph).sites] == ["full"]  # and a dense bias


@pytest.mark.parametrize("mask", [every_second, begins_late, by_halves])
def test_documents_that_are_there_stay(mask):
    site, data, graph = traced(mask)
    fold_known_values(graph)
    assert [site.mask for site in rewrite_attention(copy.deepcopy(graph)).sites] == ["full"]
    for batch, length in ((2, 21), (3, 40)):
        more = [torch.randn(batch, length, 3 * HEADS * SIZE, dtype=torch.float64)]
        torch.testing.assert_close(run_like(graph, site, more), site(*more))
    compare(site, graph, data, 1e-9)


def written_by_triu(x: Tensor) -> Tensor:
    allowed = torch.ones(x.shape[1], x.shape[1], dtype=torch.long)
    allowed.triu_(-4)
    return allowed.unsqueeze(0) != 0


def written_through_a_view(x: Tensor) -> Tensor:
    allowed = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool)
    allowed[:, 3:].fill_(False)
    return allowed.unsqueeze(0) | torch.eye(x.shape[1], dtype=torch.bool)


def written_by_add(x: Tensor) -> Tensor:
    counts = torch.zeros(x.shape[:2], dtype=torch.long)
    counts.add_(torch.arange(x.shape[1]) // 6)
    return counts[:, None, :, None] == counts[:, None, None, :]


@pytest.mark.parametrize("mask", [written_by_triu, written_through_a_view, written_by_add])
def test_what_is_written_in_place_is_not_what_it_was_made_of(mask):
    """As the training door sees it: in-place operations are still there."""
    torch.manual_seed(5)
    site = Site(attend(mask))
    data = [torch.randn(2, 21, 3 * HEADS * SIZE, dtype=torch.float64)]
    graph = trace_training(site, data)
    fold_known_values(graph)
    assert any(map(is_mutation, graph.graph.nodes))
    compare(site, graph, data, 1e-9)
    rewrite_attention(graph)
    compare(site, graph, data, 1e-9)


def test_the_training_door_keeps_a_mask_that_is_written_in_place():
    torch._dynamo.reset()
    torch.manual_seed(6)
    site = Site(attend(written_by_triu))
    x = torch.randn(2, 21, 3 * HEADS * SIZE)
    compiled = torch.compile(site, backend="vllm_generic")
    torch.testing.assert_close(compiled(x), site(x), rtol=1e-4, atol=1e-5)


def distances(x: Tensor) -> Tensor:
    return positions(x)[:, :, None] - positions(x)[:, None]


CASES: dict[str, tuple[Callable[[Tensor], Tensor], int | None]] = {
    "difference of equal positions": (lambda x: positions(x) - positions(x), 0),
    "never below": (lambda x: positions(x) + 1 <= positions(x), 0),
    "always below": (lambda x: positions(x) < positions(x) + 1, 1),
    "slice shifted": (lambda x: positions(x)[:, 2:] - positions(x)[:, :-2], 2),
    "steps of three": (lambda x: torch.diff(torch.arange(0, 3 * x.shape[1], 3)), 3),
    "sum of zeros": (lambda x: torch.zeros(x.shape[:2], dtype=torch.long).cumsum(1), 0),
    "a row less a column": (lambda x: positions(x)[:, None] - positions(x)[:, :, None], None),
    "one row spread": (lambda x: positions(x)[:, :1].expand(-1, 4), 0),
    "picked": (lambda x: torch.full((9,), 7)[positions(x) % 9], 7),
    "no padding": (lambda x: torch.ones(x.shape[:2]).bool()[torch.arange(x.shape[0])[:, None]], 1),
    "in every sequence": (
        lambda x: torch.arange(x.shape[1]).repeat(x.shape[0], 1) - positions(x),
        0,
    ),
    "the third of each": (lambda x: positions(x)[:, 3].repeat(2), 3),
    "no image": (lambda x: torch.where(torch.zeros(x.shape[:2]).int()[..., 1] == 1, 0, -1), -1),
    "repeated twice": (lambda x: positions(x).repeat(1, 2) - positions(x).repeat(1, 2), None),
    "of two sides": (lambda x: torch.where(positions(x) > 3, 5, 5), None),
    "repeated once": (lambda x: positions(x).repeat(1, 1) - positions(x), 0),
    "farther apart than all": (lambda x: distances(x) >= x.shape[1], 0),
    "nearer than one more": (lambda x: distances(x) < x.shape[1] + 1, 1),
    "turned around": (lambda x: -x.shape[1] < distances(x) * -1, 1),
    "no such position": (lambda x: positions(x) != x.shape[1], 1),
    "not below the first": (lambda x: positions(x) >= 0, 1),
    "never the sum of two": (
        lambda x: positions(x)[:, :, None] + positions(x)[:, None] > 2 * x.shape[1] - 2,
        0,
    ),
    "all but the corner": (lambda x: distances(x) >= x.shape[1] - 1, None),
    "twice as far": (lambda x: distances(x) * 2 >= x.shape[1], None),
    "the last position": (lambda x: positions(x) == x.shape[1] - 1, None),
    "as many rows": (lambda x: torch.arange(x.shape[1]) < x.shape[0], None),
    "a half": (lambda x: torch.full((3,), 0.5)[positions(x) % 3], None),
    "truth and truth": (lambda x: ((positions(x) >= 0) + (positions(x) >= 0)).long(), 1),
    "full of truth": (lambda x: torch.full(x.shape[:2], 3, dtype=torch.bool).long(), 1),
    "less than nothing": (lambda x: torch.full(x.shape[:2], -1).to(torch.uint8).long(), None),
    "float": (lambda x: positions(x).double() - positions(x).double(), None),
}


@pytest.mark.parametrize("name", CASES)
def test_the_number_is_the_value(name: str):
    function, number = CASES[name]
    site = Site(lambda x: x.sum() * 0 + function(x))
    graph = trace_directly(site, [torch.randn(3, 17, 2)], {0: (0, 1)})
    folded = fold_known_values(graph)
    assert bool(folded) == (number is not None)
    for batch, length in ((3, 17), (4, 9), (6, 6)):
        x = torch.randn(batch, length, 2)
        expected = site(x)
        torch.testing.assert_close(run_like(graph, site, [x]), expected)
        if number is not None:
            assert bool((expected == number).all())


STORED: dict[str, tuple[Tensor, InputKind, Affine | None]] = {
    "positions": (torch.arange(9)[None], InputKind.BUFFER, Affine(0, (0, 1))),
    "rows and columns": (
        4 * torch.arange(3, dtype=torch.int32)[:, None] - torch.arange(5) + 7,
        InputKind.BUFFER,
        Affine(7, (4, -1)),
    ),
    "one number": (torch.tensor(5), InputKind.BUFFER, Affine(5, ())),
    "one entry off": (torch.arange(9).index_fill(0, torch.tensor(7), 8), InputKind.BUFFER, None),
    "a float": (torch.arange(9.0), InputKind.BUFFER, None),
    "nothing": (torch.arange(0), InputKind.BUFFER, None),
    "truth": (torch.ones(4, dtype=torch.bool), InputKind.BUFFER, None),
    "learned": (torch.arange(9), InputKind.PARAMETER, None),
}


@pytest.mark.parametrize("name", STORED)
def test_what_a_buffer_holds(name: str) -> None:
    table, kind, expected = STORED[name]
    node = torch.fx.Graph().placeholder("table")
    node.meta = {"val": table, "input": GraphInput(kind, "table", table)}
    assert stored_value(node) == expected


def test_stored_positions_are_read_where_buffers_keep_what_they_hold() -> None:
    def asked(x: Tensor, table: Tensor) -> Tensor:
        p = table[:, : x.shape[1]].expand(x.shape[0], -1)
        return x.sum() * 0 + same_document(x, documents(p, p[:, :1] - 1))

    site = Site(asked, buffers=[torch.arange(64)[None]])

    def graph() -> torch.fx.GraphModule:
        return trace_directly(site, [torch.randn(3, 17, 2)], {0: (0, 1)})

    assert fold_known_values(graph()) == 0
    assert fold_known_values(graph(), stored=True) > 0


def test_nothing_is_said_at_every_size_of_rounded_numbers() -> None:
    """The count is made of plain positions, and still compared."""
    site = Site(lambda x: x.sum() * 0 + (torch.ones(x.shape[:2]).cumsum(1) <= x.shape[1]))
    graph = trace_directly(site, [torch.randn(3, 17, 2)], {0: (0, 1)})
    fold_known_values(graph)
    assert (count(graph, aten.le), count(graph, aten.cumsum)) == (1, 0)


def opt(x: Tensor) -> Tensor:
    mask = torch.ones(x.shape[:2])
    return (mask.cumsum(1) * mask - 1).long()


COUNTED: dict[str, Callable[[Tensor], Tensor]] = {
    "ones": lambda x: torch.ones(x.shape[1], dtype=torch.long).cumsum(0),
    "as OPT does": opt,
    "backwards": lambda x: 5 - torch.full(x.shape[:2], 3).cumsum(1),
    "down the batch": lambda x: torch.ones(x.shape[:2], dtype=torch.int32).cumsum(0),
    "doubled": lambda x: torch.ones(x.shape[:2]).cumsum(1) * 2 + 1,
}


@pytest.mark.parametrize("name", COUNTED)
def test_what_is_counted_becomes_plain_positions(name: str):
    site = Site(lambda x: x.sum() * 0 + COUNTED[name](x))
    graph = trace_directly(site, [torch.randn(3, 17, 2)], {0: (0, 1)})
    fold_known_values(graph)
    assert (count(graph, aten.cumsum), count(graph, aten.arange)) == (0, 1)
    for batch, length in ((3, 17), (4, 9), (6, 6)):
        x = torch.randn(batch, length, 2)
        torch.testing.assert_close(run_like(graph, site, [x]), site(x), rtol=0, atol=0)


NOT_COUNTED: dict[str, Callable[[Tensor], Tensor]] = {
    "of what the data say": lambda x: (x[..., 0] > 0).long().cumsum(1),
    "of thirds": lambda x: torch.full(x.shape[:2], 1 / 3).cumsum(1),
    "in half precision": lambda x: torch.ones(x.shape[:2], dtype=torch.bfloat16).cumsum(1),
    "a sum of sums": lambda x: torch.ones(x.shape[:2]).cumsum(1).cumsum(1),
    "in steps too large": lambda x: torch.full(x.shape[:2], 100.0).cumsum(1),
}


@pytest.mark.parametrize("name", NOT_COUNTED)
def test_what_is_not_a_plain_count_stays(name: str):
    """bfloat16 loses count at 256, float32 at 2**24."""
    site = Site(lambda x: x.sum() * 0 + NOT_COUNTED[name](x))
    graph = trace_directly(site, [torch.randn(3, 300, 2)], {0: (0, 1)})
    fold_known_values(graph)
    assert count(graph, aten.cumsum) >= 1
    x = torch.randn(2, 400, 2)
    torch.testing.assert_close(run_like(graph, site, [x]), site(x), rtol=0, atol=0)


def test_a_region_under_vmap_keeps_its_beginning_and_end() -> None:
    """Nothing reads those two calls, and without them the region's tensors do not run."""

    def function(x: Tensor) -> Tensor:
        y = attend(none_at_all)(x)
        return torch.vmap(torch.mul, (1, 1), 1, randomness="same")(y, y.sin())

    site = Site(function)
    data = [torch.randn(2, 9, 3 * HEADS * SIZE, dtype=torch.float64)]
    graph = trace_training(site, data)
    assert fold_known_values(graph) > 0
    compare(site, graph, data, 1e-9)


@pytest.mark.parametrize(
    ("pad", "looked_up", "folded"),
    [(-1, True, True), (-100, True, True), (0, True, False), (-1, False, False)],
)
def test_ids_that_are_looked_up_are_never_negative(pad: int, looked_up: bool, folded: bool) -> None:
    def function(ids: Tensor, table: Tensor) -> Tensor:
        """Learned positions that count what is no padding; labels may be negative."""
        counted = ((~(ids == pad)).cumsum(1) - 1).clamp(min=0)
        rows = F.embedding(counted, table)
        return rows + F.embedding(ids if looked_up else ids.clamp(min=0), table)

    ids, table = torch.tensor([[3, 0, 2, 1], [1, 0, 4, 4]]), torch.randn(7, 3)
    if not looked_up:
        ids[0, 1] = -1
    site = Site(function)
    gm = trace_directly(site, [ids, table], {0: (0, 1)})
    assert (fold_known_values(gm) > 0) == folded
    assert bool(gm.graph.find_nodes(op="call_function", target=aten.cumsum.default)) != folded
    found = run_like(gm, site, [ids, table])
    torch.testing.assert_close(found, function(ids, table), rtol=0, atol=0)


def test_a_table_is_no_id_that_is_looked_up_in_it() -> None:
    def function(ids: Tensor, table: Tensor) -> Tensor:
        return F.embedding(ids, table) * (table == -1).sum()

    ids, table = torch.tensor([[3, 0]]), torch.full((7, 3), -1.0)
    site = Site(function)
    gm = trace_directly(site, [ids, table], {0: (0, 1)})
    fold_known_values(gm)
    assert torch.equal(run_like(gm, site, [ids, table]), function(ids, table))


@pytest.mark.parametrize(
    "function",
    [
        lambda x, p: x + (p.clamp(min=1) == p),
        lambda x, p: x + ((p * -1 + 2).clamp(min=0) == p * -1 + 2),
        lambda x, p: x + (p.clamp(min=0, max=3) == p),
        lambda x, p: x + ~torch.zeros_like(p),
        lambda x, p: torch.cat([x, x], 1) + (p.repeat(1, 2) == torch.arange(2 * x.shape[1])),
    ],
)
def test_almost_the_same_positions(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    site, data = Site(lambda x: function(x, positions(x))), [torch.randn(2, 7)]
    gm = trace_directly(site, data, {0: (0, 1)})
    fold_known_values(gm)
    for given in (data, [torch.randn(3, 5)]):
        assert torch.equal(run_like(gm, site, given), site(*given))
