"""Sites that must not be taken for what they are not; whatever happens, results stay the same."""

from __future__ import annotations

import pytest
import torch
from attention_graphs import Site, compare, rewrite, softmax_count, trace_training
from tricky_spellings import TRICKY, Tricky


def make(case: Tricky) -> Site:
    return Site(case.function, [p() for p in case.parameters], [b() for b in case.buffers])


def example(batch: int, length: int, heads: int = 4, size: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(batch * 100 + length)
    shape = (3, batch, length, heads, size)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("dynamic", [False, True], ids=["plain", "symbolic"])
@pytest.mark.parametrize("case", TRICKY, ids=str)
def test_tricky(case: Tricky, dynamic: bool) -> None:
    module = make(case)
    data = example(2, 15)
    graph = trace_training(module, [data], {0: (1, 2)} if dynamic else {})
    before = softmax_count(graph)
    rewritten = rewrite(graph)
    if case.reason:
        assert rewritten.count == 0 and softmax_count(rewritten.graph) == before
        assert case.reason in rewritten.left()
        reason = next(d.reason for d in rewritten.result.decisions if d.reason is not None)
        assert reason.location is not None
        assert "spellings" in reason.location.file or "tricky" in reason.location.file
    for site in rewritten.result.sites:
        assert case.found in str(site)
        assert case.found or site.mask != "causal" or site.bias
    assert not case.found or rewritten.count == 1
    lengths = [(2, 15)] if not dynamic else [(2, 15), (3, 7), (2, 16), (2, 3)]
    for batch, length in lengths:
        compare(module, rewritten.graph, [example(batch, length)])


@pytest.mark.parametrize("name", ["keys_permuted", "values_transposed"])
def test_coinciding_sizes(name: str) -> None:
    case = next(c for c in TRICKY if str(c) == name)
    module = make(case)
    for shape in ((1, 8, 8, 8), (1, 6, 6, 6), (8, 8, 8, 8)):
        data = example(*shape)
        rewritten = rewrite(trace_training(module, [data]))
        compare(module, rewritten.graph, [data])
