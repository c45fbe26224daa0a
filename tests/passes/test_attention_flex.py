"""FlexAttention calls become `fxport::attention`, their functions understood.

FlexAttention has no backward on CPU, so gradients are compared with the same formula written out
in eager float64; values also with FlexAttention itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from attention_graphs import Site, compare, rewrite, run_like, trace_serving, trace_training
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.nn.attention.flex_attention import (
    BlockMask,
    create_block_mask,
    flex_attention,
)

from fxport.passes.attention.flex import is_flex

Function = Callable[..., Any]

BATCH, HEADS, KV_HEADS, LENGTH, SIZE = 2, 4, 2, 13, 6


@dataclass(frozen=True)
class Flex:
    """One call.

    Attributes:
        score, mask: functions made from the module's tensors (parameters, then buffers), or None.
        expect: words in the decision.
        parameters, buffers: shapes of the tensors, or the tensors.
        kv_heads: less than `HEADS` with enable_gqa.
    """

    name: str
    expect: tuple[str, ...]
    score: Function | None = None
    mask: Function | None = None
    parameters: tuple[tuple[int, ...], ...] = ()
    buffers: tuple[Tensor, ...] = ()
    kv_heads: int = HEADS


def causal(*_: Tensor) -> Function:
    return lambda b, h, i, j: j <= i


def window(*_: Tensor) -> Function:
    return lambda b, h, i, j: (j <= i) & (i - j < 4)


def prefix(*_: Tensor) -> Function:
    return lambda b, h, i, j: (j <= i) | (j < 3)


def documents(ids: Tensor) -> Function:
    return lambda b, h, i, j: (j <= i) & (ids[i] == ids[j])


def documents_of_batch(ids: Tensor) -> Function:
    return lambda b, h, i, j: (j <= i) & (ids[b][i] == ids[b, j])


def softcap(*_: Tensor) -> Function:
    return lambda s, b, h, i, j: 2.0 * torch.tanh(s / 2.0)


def alibi(slopes: Tensor) -> Function:
    return lambda s, b, h, i, j: s + slopes[h] * (j - i)


def fixed_alibi(*_: Tensor) -> Function:
    return lambda s, b, h, i, j: s + torch.exp2(-(h + 1.0)) * (j - i)


def relative(table: Tensor) -> Function:
    return lambda s, b, h, i, j: s + table[h, i - j + LENGTH - 1]


def causal_in_score(*_: Tensor) -> Function:
    return lambda s, b, h, i, j: torch.where(j <= i, s, -float("inf"))


def temperature(factors: Tensor) -> Function:
    return lambda s, b, h, i, j: s * factors[h]


IDS = torch.tensor([0] * 5 + [1] * 8)
IDS_OF_BATCH = torch.stack([IDS, torch.tensor([0] * 2 + [1] * 7 + [2] * 4)])
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625], dtype=torch.float64)

CASES = [
    Flex("plain", ("full",)),
    Flex("causal", ("causal",), mask=causal),
    Flex("window", ("causal, window 4",), mask=window),
    Flex("prefix", ("dense constant bias",), mask=prefix),
    Flex("softcap", ("softcap 2", "causal"), score=softcap, mask=causal),
    Flex("alibi", ("ALiBi", "causal"), score=alibi, mask=causal, buffers=(SLOPES,)),
    Flex("learned_alibi", ("causal",), score=alibi, mask=causal, parameters=((HEADS,),)),
    Flex("relative", ("learned", "causal"), relative, causal, ((HEADS, 2 * LENGTH - 1),)),
    Flex("causal_in_score", ("causal",), score=causal_in_score),
    Flex("temperature", ("causal",), temperature, causal, ((HEADS,),)),
    Flex("gqa", ("2 kv heads", "causal"), mask=causal, kv_heads=KV_HEADS),
]


def functions(case: Flex, tensors: tuple[Tensor, ...]) -> tuple[Function | None, Function | None]:
    score = None if case.score is None else case.score(*tensors)
    return score, None if case.mask is None else case.mask(*tensors)


def flex(case: Flex, block_mask: BlockMask | None = None) -> Callable[..., Tensor]:
    def function(q: Tensor, k: Tensor, v: Tensor, *tensors: Tensor) -> Tensor:
        score, mask = functions(case, tensors)
        blocks = block_mask
        if mask is not None and blocks is None:
            args = (BATCH, HEADS, q.size(2), k.size(2))
            blocks = create_block_mask(mask, *args, device="cpu", _compile=False)
        grouped = case.kv_heads != HEADS
        return flex_attention(q, k, v, score, blocks, 0.3, enable_gqa=grouped)

    return function


def written_out(case: Flex) -> Callable[..., Tensor]:
    def function(q: Tensor, k: Tensor, v: Tensor, *tensors: Tensor) -> Tensor:
        score, mask = functions(case, tensors)
        groups = q.size(1) // k.size(1)
        k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
        s = q @ k.mT * 0.3
        rows = []
        for b in range(q.size(0)):
            for h in range(q.size(1)):
                for i in range(q.size(2)):
                    for j in range(k.size(2)):
                        at = [torch.tensor(x) for x in (b, h, i, j)]
                        x = s[b, h, i, j]
                        x = x if score is None else score(x, *at)
                        allowed = mask is None or bool(mask(*at))
                        rows.append(x if allowed else torch.full_like(x, float("-inf")))
        return torch.stack(rows).view_as(s).softmax(-1) @ v

    return function


def operands(kv_heads: int, length: int = LENGTH) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)
    shapes = [(BATCH, h, length, SIZE) for h in (HEADS, kv_heads, kv_heads)]
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]


def sites(case: Flex, block_mask: BlockMask | None = None) -> tuple[Site, Site]:
    """The call and its formula, with equal tensors."""
    generator = torch.Generator().manual_seed(5)
    made = [torch.rand(s, generator=generator, dtype=torch.float64) for s in case.parameters]
    return (
        Site(flex(case, block_mask), made, case.buffers),
        Site(written_out(case), made, case.buffers),
    )


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_training(case: Flex) -> None:
    module, reference = sites(case)
    data = operands(case.kv_heads)
    found = rewrite(trace_training(module, data))
    (detail,) = [d.detail for d in found.result.decisions if d.detail]
    for words in case.expect:
        assert words in detail, detail
    assert found.count == 1
    assert not [n for n in found.graph.graph.nodes if "flex" in str(n.target)]
    compare(reference, found.graph, data)
    with torch.no_grad():
        torch.testing.assert_close(run_like(found.graph, module, data)[0], module(*data))


@pytest.mark.parametrize("name", ["plain", "causal", "window", "softcap", "alibi", "gqa"])
def test_serving(name: str) -> None:
    case = next(c for c in CASES if c.name == name)
    module, _ = sites(case)
    data = operands(case.kv_heads)
    found = rewrite(trace_serving(module, data, [(None, None, None)]))
    (detail,) = [d.detail for d in found.result.decisions if d.detail]
    assert found.count == 1 and all(words in detail for words in case.expect), detail
    with torch.no_grad():
        torch.testing.assert_close(run_like(found.graph, module, data)[0], module(*data))


@pytest.mark.parametrize("name", ["causal", "window", "prefix", "softcap", "gqa"])
def test_symbolic_lengths(name: str) -> None:
    case = next(c for c in CASES if c.name == name)
    module, reference = sites(case)
    data = operands(case.kv_heads)
    found = rewrite(trace_training(module, data, {0: (2,), 1: (2,), 2: (2,)}))
    (detail,) = [d.detail for d in found.result.decisions if d.detail]
    assert all(words in detail for words in case.expect), detail
    for length in (LENGTH, 5, 17):
        compare(reference, found.graph, operands(case.kv_heads, length))


@pytest.mark.parametrize("per_batch", [False, True])
def test_documents(per_batch: bool) -> None:
    """A block mask made beforehand, whose function captured the ids."""
    function = documents_of_batch(IDS_OF_BATCH) if per_batch else documents(IDS)
    case = Flex("documents", (), mask=lambda *_: function)
    args = (BATCH if per_batch else None, None, LENGTH, LENGTH)
    module, reference = sites(case, create_block_mask(function, *args, device="cpu"))
    data = operands(HEADS)
    found = rewrite(trace_training(module, data))
    assert [site.bias for site in found.result.sites] in (["constant"], ["data"])
    compare(reference, found.graph, data)


def test_documents_given_to_every_call() -> None:
    """The block mask is made of the ids inside the model; in its trace nothing writes to them."""

    def ids_of(ids: Tensor) -> Function:
        return lambda b, h, i, j: (j <= i) & (ids[b, i] == ids[b, j])

    def function(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
        blocks = create_block_mask(ids_of(ids), BATCH, None, LENGTH, LENGTH, device="cpu")
        return flex_attention(q, k, v, block_mask=blocks)

    def reference(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
        i, b = torch.arange(LENGTH), torch.arange(BATCH)[:, None, None, None]
        s = (q @ k.mT * SIZE**-0.5).masked_fill(~ids_of(ids)(b, 0, i[:, None], i), -torch.inf)
        return s.softmax(-1) @ v

    data = [*operands(HEADS), IDS_OF_BATCH]
    found = rewrite(trace_training(Site(function), data))
    assert [site.bias for site in found.result.sites] == ["data"]
    for ids in (IDS_OF_BATCH, IDS_OF_BATCH.flip(0), IDS_OF_BATCH * 0):
        compare(Site(reference), found.graph, [*data[:3], ids])


def test_blocks_are_skipped_on_a_gpu() -> None:
    """There a mask that no flag says stays with FlexAttention."""
    (case,) = (c for c in CASES if c.name == "prefix")
    graph = trace_training(sites(case)[0], operands(case.kv_heads))
    for node in graph.graph.nodes:
        if isinstance(node.meta.get("val"), FakeTensor):
            node.meta["val"].fake_device = torch.device("cuda", 0)
    found = rewrite(graph)
    assert found.count == 0 and sum(map(is_flex, found.graph.graph.nodes)) == 1


def test_equal_sizes_confuse_nothing() -> None:
    """B == H == T == D == 4."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex_attention(
            q, k, v, lambda s, b, h, i, j: torch.where(j <= i, s - (h + 1) * (i - j), -torch.inf)
        )

    def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i, h = torch.arange(4), torch.arange(1, 5)[:, None, None]
        s = q @ k.mT / 2 - h * (i[:, None] - i)
        return s.masked_fill(i > i[:, None], -torch.inf).softmax(-1) @ v

    data = [torch.randn(4, 4, 4, 4, dtype=torch.float64) for _ in range(3)]
    found = rewrite(trace_training(Site(function), data))
    assert found.count == 1 and found.result.sites[0].alibi
    compare(Site(reference), found.graph, data)


def test_rows_without_keys_give_zeros() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex_attention(
            q, k, v, lambda s, b, h, i, j: torch.where(j < i, s, -torch.inf), scale=0.3
        )

    data = operands(HEADS)
    found = rewrite(trace_training(Site(function), data))
    assert found.count == 1
    expected = Site(function)(*data)
    assert not expected[:, :, 0].any()
    torch.testing.assert_close(run_like(found.graph, Site(function), data)[0], expected)


# -- refusals: the call stays as it was ------------------------------------------------------------


def summed_table(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return s + SLOPES.sum() * (j - i)


def row_of_table(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return s + (IDS_OF_BATCH[b] * 1.0).sum()


def cap_after_mask(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return 2.0 * torch.tanh(torch.where(j <= i, s, -1e4) / 2.0)


@pytest.mark.parametrize(
    ("score", "code"),
    [
        (summed_table, "unsupported-feature"),
        (row_of_table, "unsupported-feature"),
        (cap_after_mask, "order-of-operations"),
    ],
)
def test_scores_that_are_refused(score: Function, code: str) -> None:
    module = Site(lambda q, k, v: flex_attention(q, k, v, score, scale=0.3))
    check_left(module, code, "flex_attention(q, k, v, score")


def test_logsumexp_is_refused() -> None:
    module = Site(lambda q, k, v: flex_attention(q, k, v, return_lse=True))
    check_left(module, "unsupported-feature", "return_lse")


def test_blocks_without_a_function_are_refused() -> None:
    counts = torch.ones(1, 1, 1, dtype=torch.int32)
    blocks = BlockMask.from_kv_blocks(counts, counts[..., None] * 0, BLOCK_SIZE=LENGTH)
    module = Site(lambda q, k, v: flex_attention(q, k, v, block_mask=blocks))
    check_left(module, "mask-depends-on-data", "block_mask=blocks")


def check_left(module: Site, code: str, source: str) -> None:
    data = operands(HEADS)
    graph = trace_training(module, data)
    before = [str(n.target) for n in graph.graph.nodes]
    found = rewrite(graph)
    assert found.left() == [code] and found.count == 0
    (decision,) = found.result.decisions
    assert decision.subject == "flex_attention"
    assert decision.reason is not None and decision.reason.location is not None
    assert source in decision.reason.location.source
    after = [str(n.target) for n in found.graph.graph.nodes]
    assert sorted(before) == sorted(after)


@pytest.mark.parametrize("wrong", ["mask", "score"])
def test_the_comparison_notices(wrong: str) -> None:
    """A formula that differs by one key, or by a cap a little off, must not pass."""
    case = Flex("right", (), softcap, window)
    off = Flex("wrong", (), softcap, lambda *_: lambda b, h, i, j: (j <= i) & (i - j < 5))
    if wrong == "score":
        off = Flex("wrong", (), lambda *_: lambda s, *_: 2.1 * torch.tanh(s / 2.1), window)
    data = operands(HEADS)
    found = rewrite(trace_training(sites(case)[0], data))
    assert found.count == 1
    with pytest.raises(AssertionError, match="relative error"):
        compare(sites(off)[1], found.graph, data)
