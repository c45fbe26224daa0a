"""Every spelling is found, and outputs and gradients stay those of the original, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_graphs import (
    Site,
    compare,
    rewrite,
    run_like,
    softmax_count,
    trace_directly,
    trace_serving,
    trace_training,
)
from spellings import LEGAL, Spelling


def make(spelling: Spelling) -> Site:
    return Site(
        spelling.function, [p() for p in spelling.parameters], [b() for b in spelling.buffers]
    )


def example(batch: int = 2, length: int = 7) -> torch.Tensor:
    generator = torch.Generator().manual_seed(batch * 100 + length)
    return torch.randn(3, batch, length, 4, 6, generator=generator, dtype=torch.float64)


def check_found(rewritten: Any, spelling: Spelling, before: int) -> None:
    details = [d.detail for d in rewritten.result.decisions if d.detail]
    assert rewritten.count == len(details) > 0, rewritten.result.decisions
    assert softmax_count(rewritten.graph) == 0 < before
    for detail in details:
        for words in spelling.expect:
            assert words in detail, (words, detail)


@pytest.mark.parametrize("spelling", LEGAL, ids=str)
def test_training_symbolic_lengths(spelling: Spelling) -> None:
    module = make(spelling)
    graph = trace_training(module, [example()], {0: (1, 2)})
    before = softmax_count(graph)
    rewritten = rewrite(graph)
    check_found(rewritten, spelling, before)
    for batch, length in ((2, 7), (3, 5), (2, 16), (5, 11)):
        compare(module, rewritten.graph, [example(batch, length)])


@pytest.mark.parametrize("spelling", LEGAL, ids=str)
def test_serving(spelling: Spelling) -> None:
    module = make(spelling)
    auto = torch.export.Dim.AUTO
    graph = trace_serving(module, [example()], [({1: auto, 2: auto},)])
    before = softmax_count(graph)
    rewritten = rewrite(graph)
    check_found(rewritten, spelling, before)
    for batch, length in ((2, 7), (3, 16)):
        data = example(batch, length)
        with torch.no_grad():
            actual = run_like(rewritten.graph, module, [data])[0]
            torch.testing.assert_close(actual, module(data), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("spelling", LEGAL, ids=str)
def test_plain_and_equal_sizes_confuse_nothing(spelling: Spelling) -> None:
    """B == H == T == 4, all of them numbers; how Dynamo captures it is seen above."""
    data = example(4, 4)
    module = make(spelling)
    rewritten = rewrite(trace_directly(module, [data]))
    assert rewritten.count > 0
    compare(module, rewritten.graph, [data])
