"""Spellings and tricky cases that need no Dynamo to be seen: found, or left with a true reason."""

from __future__ import annotations

import pytest
import torch
from attention_graphs import Site, compare, rewrite, softmax_count, trace_directly
from spellings import LEGAL
from spellings_base import DIRECT, Spelling
from test_attention_spellings import check_found, example, make
from tricky_spellings import DIRECT as TRICKY
from tricky_spellings import Tricky

assert LEGAL  # importing them fills the other list as well


@pytest.mark.parametrize("spelling", DIRECT, ids=str)
def test_found(spelling: Spelling) -> None:
    module = make(spelling)
    graph = trace_directly(module, [example()], {0: (1, 2)})
    before = softmax_count(graph)
    rewritten = rewrite(graph)
    check_found(rewritten, spelling, before)
    for batch, length in ((2, 7), (3, 5)):
        compare(module, rewritten.graph, [example(batch, length)])
    rewritten = rewrite(trace_directly(module, [example(4, 4)]))
    assert rewritten.count > 0
    compare(module, rewritten.graph, [example(4, 4)])


def test_a_factor_for_each_pair_is_no_factor_of_the_keys() -> None:
    """Only what is the same for all queries may go onto the values."""
    case = next(c for c in TRICKY if str(c) == "weights_gated_by_the_pair")
    found = rewrite(trace_directly(Site(case.function), [example(2, 15)]))
    (reason,) = [d.reason for d in found.result.decisions if d.reason is not None]
    assert reason.message == "the weights are multiplied by something else for every key"


@pytest.mark.parametrize("case", TRICKY, ids=str)
def test_tricky(case: Tricky) -> None:
    module = Site(case.function)
    graph = trace_directly(module, [example(2, 15)])
    before = softmax_count(graph)
    rewritten = rewrite(graph)
    if case.reason:
        assert rewritten.count == 0 and softmax_count(rewritten.graph) == before
        assert case.reason in rewritten.left(), rewritten.result.decisions
    assert all(case.found in str(site) for site in rewritten.result.sites), rewritten.result.sites
    assert not case.found or rewritten.count == 1
    compare(module, rewritten.graph, [example(2, 15)])


def test_an_einsum_of_three_that_names_no_result() -> None:
    """Its letters that occur once are the result, in order."""

    def function(x: torch.Tensor, between: torch.Tensor) -> torch.Tensor:
        q, k, v = x.unbind(0)
        return torch.einsum("id,de,je", q, between, k).softmax(-1) @ v

    generator = torch.Generator().manual_seed(3)
    data = [torch.randn(3, 5, 4, generator=generator, dtype=torch.float64)]
    module = Site(function, [torch.randn(4, 4, generator=generator, dtype=torch.float64)])
    compare(module, rewrite(trace_directly(module, data)).graph, data)
