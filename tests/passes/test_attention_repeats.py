"""Repeated heads by index, cat or stack become the repetition that they are; the rest stays."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from fxport.passes.attention import repeats as attention_repeats
from fxport.passes.attention.repeats import spell_out_repeats
from tests.passes.attention_graphs import Site, run_like, trace_training

aten = torch.ops.aten
KV, LENGTH, WIDTH = 3, 7, 5


def by_index_select(k: Tensor) -> Tensor:
    return k.index_select(1, torch.tensor([0, 0, 1, 1, 2, 2])) * 1.5


def by_index(k: Tensor) -> Tensor:
    return k[:, torch.tensor([0, 1, 2, 0, 1, 2])] * 1.5


def by_cat(k: Tensor) -> Tensor:
    return torch.cat([k[:, i : i + 1] for i in range(KV) for _ in range(2)], 1) * 1.5


def by_cat_whole(k: Tensor) -> Tensor:
    return torch.cat([k, k, k, k], 1) * 1.5


def by_stack(k: Tensor) -> Tensor:
    return torch.stack([k, k], 2).flatten(1, 2) * 1.5


INTERLEAVED, TILED, SPREAD = (
    aten.repeat_interleave.self_int,
    aten.repeat.default,
    aten.expand.default,
)
CASES = [
    (by_index_select, aten.index_select.default, INTERLEAVED),
    (by_index, aten.index.Tensor, TILED),
    (by_cat, aten.cat.default, INTERLEAVED),
    (by_cat_whole, aten.cat.default, TILED),
    (by_stack, aten.stack.default, SPREAD),
]


def counts(gm: fx.GraphModule) -> Counter[Any]:
    return Counter(n.target for n in gm.graph.nodes if n.op == "call_function")


def keys(batch: int = 2, length: int = LENGTH, width: int = WIDTH) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, KV, length, width, generator=generator, dtype=torch.float64)


def with_gradient(function: Callable[[Tensor], Tensor], k: Tensor) -> tuple[Tensor, Tensor]:
    k = k.clone().requires_grad_()
    out = function(k)
    (gradient,) = torch.autograd.grad((out * torch.arange(out.numel()).view_as(out)).sum(), k)
    return out, gradient


def graph_of(function: Callable[[Tensor], Tensor], k: Tensor) -> fx.GraphModule:
    return trace_training(Site(function), (k,))


def same(gm: fx.GraphModule, function: Callable[[Tensor], Tensor], k: Tensor) -> bool:
    site = Site(function)
    actual = with_gradient(lambda x: run_like(gm, site, (x,))[0], k)
    pairs = zip(actual, with_gradient(function, k), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("shape", [(2, LENGTH, WIDTH), (KV, KV, KV)], ids=["sizes", "equal"])
@pytest.mark.parametrize(
    ("function", "gone", "new"), CASES, ids=lambda x: getattr(x, "__name__", "")
)
def test_a_repetition(function: Any, gone: Any, new: Any, shape: tuple[int, int, int]) -> None:
    k = keys(*shape)
    gm = graph_of(function, k)
    assert counts(gm)[gone] == 1 and not counts(gm)[new]
    spell_out_repeats(gm)
    gm.recompile()
    assert counts(gm)[new] == 1 and not counts(gm)[gone]
    assert same(gm, function, k)


def other_order(k: Tensor) -> Tensor:
    return k.index_select(1, torch.tensor([0, 1, 1, 0, 2, 2])) * 1.5


def once(k: Tensor) -> Tensor:
    return k[:, torch.tensor([0, 1, 2])] * 1.5


def uneven(k: Tensor) -> Tensor:
    return torch.cat([k[:, :1], k[:, :1], k[:, 1:]], 1) * 1.5


def two_tensors(k: Tensor) -> Tensor:
    return torch.stack([k, k * 2], 2).flatten(1, 2) * 1.5


def written_later(k: Tensor) -> Tensor:
    """A stack is a copy: what is written into its source later does not show."""
    h = k * 1.0
    both = torch.stack([h, h], 2)
    h.add_(1.0)
    return both.flatten(1, 2) * h.repeat_interleave(2, 1)


def new_cache(k: Tensor) -> Tensor:
    """How transformers begins one: a tensor without elements or dimensions to speak of."""
    return torch.cat([k.new_empty(0), k], 2) * 1.5


@pytest.mark.parametrize(
    "function", [other_order, once, uneven, two_tensors, written_later, new_cache]
)
def test_what_is_no_repetition_stays(function: Callable[[Tensor], Tensor]) -> None:
    k = keys()
    gm = graph_of(function, k)
    before = counts(gm)
    spell_out_repeats(gm)
    gm.recompile()
    assert counts(gm) == before
    assert same(gm, function, k)


def test_the_comparison_sees_a_wrong_repetition(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every second head for each head twice."""
    original = attention_repeats._indexed

    def tiled(facts: Any, node: fx.Node) -> Any:
        found = original(facts, node)
        return found and ((found[0][0], [0, 1, 2, 0, 1, 2]), found[1])

    monkeypatch.setattr(attention_repeats, "_indexed", tiled)
    k = keys()
    gm = graph_of(by_index_select, k)
    spell_out_repeats(gm)
    gm.recompile()
    assert not same(gm, by_index_select, k)
