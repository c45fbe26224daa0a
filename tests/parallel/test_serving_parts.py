"""The serving graph on N simulated ranks, in float64: every rank has the logits of one rank."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxport.parallel.modules import ReduceFrom
from fxport.passes.tensor_parallel.vocabulary import bounds, divides, padding
from tests.parallel.further import FURTHER
from tests.parallel.models import HEAD, LAYERS, MODELS, WIDTH, Decoder
from tests.parallel.serving_ranks import Ranks, Served, divided, error, served
from tests.zoo.chosen_experts import EXPERTS, LOOK_UPS, of_styles
from tests.zoo.experts import EXACT, decoder
from tests.zoo.gpt import GPT
from tests.zoo.llama import Llama
from tests.zoo.oss import OSS
from tests.zoo.parallel import ParallelGPT
from tests.zoo.styles import STYLES

ATTENTION = torch.ops.fxport.attention.default


class Inferred(nn.Module):
    """Heads from ``view(.., -1, D)``, grouped by SDPA itself, the positions in partial rotary."""

    def __init__(self, heads: int = 8, kv_heads: int = 4) -> None:
        super().__init__()
        self.q = nn.Linear(WIDTH, heads * HEAD)
        self.k, self.v = (nn.Linear(WIDTH, kv_heads * HEAD) for _ in range(2))
        self.out = nn.Linear(heads * HEAD, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (p(x).view(b, t, -1, HEAD).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(y.transpose(1, 2).reshape(b, t, -1))


class Strange(nn.Module):
    """An op without a rule between two projections."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 40), nn.Linear(40, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).softmax(-1))


ZOO: dict[str, Callable[[], nn.Module]] = {
    "gpt": lambda: GPT(n_head=4),
    "llama, complex": Llama,
    "llama, rotate half": lambda: Llama(complex_rope=False),
    "sinks, experts": OSS,
    "parallel blocks": ParallelGPT,
    "heads inferred": lambda: Decoder(Inferred),
    "heads inferred, few": lambda: Decoder(lambda: Inferred(12, 2)),
}
QUICK = ("mistral", "qwen3", "falcon", "olmo2", "starcoder2", "nn.TransformerEncoder", "speed run")
# Not served in float64: the port itself differs from the model there, by its own float32 parts.
LONG = [name for name in STYLES if name not in (*QUICK, "nn.MultiheadAttention")]
SPELLINGS = ("chunk", "split, tied", "unbind, packed GLU", "interleaved", "grouped, few kv heads",
             "norm over all heads", "learned scale")  # fmt: skip
# Models whose own arithmetic is float32 (logits, rotary tables) agree to its rounding.
FLOAT32 = 1e-6


def in_float32(case: Served) -> bool:
    """Whether the model computes something in float32 whatever its parameters are."""
    serving = case.serving
    if any(t.dtype in (torch.float32, torch.complex64) for t in case.values.values()):
        return True
    nodes = [n for p in (serving.embed, serving.body, serving.head) for n in p.graph.nodes]
    return any(torch.float32 in (*n.args, *n.kwargs.values()) for n in nodes)


def check(build: Callable[[], nn.Module], ranks: tuple[int, ...]) -> None:
    case = served(build())
    for world_size in ranks:
        found = divided(case, world_size)
        assert error(case, found) < (FLOAT32 if in_float32(case) else 1e-12), world_size
        for shard in found.plan.parameters:
            assert shard.kind != "replicated" or shard.reason


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name: str) -> None:
    check(MODELS[name], (2, 3, 4))


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in MODELS if name not in SPELLINGS])
def test_further_spellings(name: str) -> None:
    check(MODELS[name], (2, 3, 4))


@pytest.mark.parametrize("name", ZOO)
def test_zoo(name: str) -> None:
    check(ZOO[name], (2, 3, 4))


@pytest.mark.parametrize("name", ["turned weights", "scaled", "selected experts"])
def test_weights_used_in_other_ways(name: str) -> None:
    check(FURTHER[name], (2, 3))


@pytest.mark.parametrize("name", QUICK)
def test_styles(name: str) -> None:
    check(STYLES[name], (2, 3, 4))


@pytest.mark.long
@pytest.mark.parametrize("name", LONG)
def test_further_styles(name: str) -> None:
    check(STYLES[name], (2, 3, 4))


def test_weights_looked_up_by_expert_are_divided_and_reduced_once() -> None:
    case = served(of_styles(LOOK_UPS))
    for world_size, sums in ((2, 2), (3, 1)):  # two heads are not for three ranks
        found = divided(case, world_size)
        assert error(case, found) < 1e-12
        for layer in range(LAYERS):
            shards = [found.plan.shard(f"blocks.{layer}.mlp.{n}") for n in ("up", "down", "bias")]
            assert sorted(s.kind for s in shards) == ["column", "column", "row"]
            assert all(s.local_shape(0)[0] == EXPERTS for s in shards)
        # attention, experts after their weighted sum; the embedding
        forward = [c for c in found.plan.collectives if c.direction == "forward"]
        reduced = [c.elements_per_token for c in forward if c.kind == "all_reduce"]
        width = case.serving.hidden_size
        assert reduced == [width] * (sums * LAYERS + 1)


def test_dense_block_costs_two_reductions_and_the_weights_are_halved() -> None:
    plan = divided(served(GPT(n_head=4)), 2).plan
    # one more for the vocabulary; the logits are gathered
    assert plan.count("forward") == 2 * LAYERS + 1
    assert plan.count("forward", "all_gather") == 1
    assert not plan.replicated
    assert plan.shard("transformer.h.0.attn.c_attn.weight").kind == "column"


def test_looped_experts_are_divided_inside_at_the_price_of_one() -> None:
    case = served(decoder(EXACT["one-hot"], layers=1))
    found = divided(case, 2)
    assert error(case, found) < 1e-12
    assert found.plan.count("forward") == 2 * LAYERS + 1
    kinds = {found.plan.shard(f"blocks.0.mlp.experts.{e}.up.weight").kind for e in range(3)}
    assert kinds == {"column"}


def test_heads_that_are_inferred_are_divided() -> None:
    plan = divided(served(ZOO["heads inferred"]()), 4).plan
    assert plan.shard("blocks.0.attention.k.weight").kind == "column"
    assert plan.shard("blocks.0.attention.out.weight").kind == "row"


def test_heads_that_do_not_divide_are_replicated_and_the_rest_is_divided() -> None:
    plan = divided(served(GPT(n_head=3)), 2).plan
    assert plan.shard("transformer.h.0.attn.c_attn.weight").kind == "replicated"
    assert plan.shard("transformer.h.0.mlp.c_fc.weight").kind == "column"
    assert any("3 heads do not divide by 2 ranks" in r.reason for r in plan.replicated)


def test_unknown_op_is_replicated_and_reported() -> None:
    case = served(Decoder(lambda: Inferred(4, 4), Strange))
    found = divided(case, 2)
    assert found.plan.shard("blocks.2.mlp.up.weight").kind == "replicated"
    assert any("aten.softmax.int in blocks.2.mlp" in r.reason for r in found.plan.replicated)
    assert error(case, found) < 1e-12


@pytest.mark.parametrize(("size", "ranks"), [(97, 2), (50257, 8), (32000, 3), (128256, 8), (64, 4)])
def test_vocabulary_rows_are_vllms(size: int, ranks: int) -> None:
    from vllm.model_executor.layers.vocab_parallel_embedding import (
        pad_vocab_size,
        vocab_range_from_global_vocab_size,
    )

    padded = pad_vocab_size(size, padding(size, ranks))
    limits = bounds(size, ranks)
    assert divides(size, ranks) and limits[-1] == size
    for rank in range(ranks):
        first, last = vocab_range_from_global_vocab_size(padded, rank, ranks)
        assert (min(first, size), min(last, size)) == (limits[rank], limits[rank + 1])


def test_vocabulary_that_leaves_a_rank_without_rows_is_not_divided() -> None:
    assert not divides(5, 4)


# -- mutants: each breaks the graph of every rank in one way ------------------------------------


def _drop_reduction(graph: fx.Graph) -> None:
    node = next(n for n in graph.nodes if n.op == "call_module")
    node.replace_all_uses_with(node.args[0])
    graph.erase_node(node)


def _bias_before_the_reduction(graph: fx.Graph) -> None:
    reduced = next(n for n in graph.nodes if n.op == "call_module")
    (added,) = reduced.users
    linear, bias = reduced.args[0], added.args[1]
    linear.args = (*linear.args[:2], bias)
    added.replace_all_uses_with(reduced)
    graph.erase_node(added)


def _wrong_kv_head(graph: fx.Graph) -> None:
    node = next(n for n in graph.nodes if n.target is ATTENTION)
    with graph.inserting_before(node):
        k = graph.call_function(torch.ops.aten.flip.default, (node.kwargs["k"], [1]))
    node.kwargs = {**node.kwargs, "k": k}


def _sinks_of_rank_0(ranks: Ranks) -> None:
    for part in ranks.parts:
        assert part.plan is not None
        shard = part.plan.shard("blocks.0.attn.sinks")
        object.__setattr__(shard, "indices", (shard.indices[0],) * len(shard.indices))


def _part_counted_twice(graph: fx.Graph) -> None:
    """The moment of a norm over positions that two ranks hold."""
    sums = [n for n in graph.nodes if n.target is torch.ops.aten.sum.dim_IntList]
    taken = next(n for n in sums if n.args[0].target is torch.ops.aten.slice.Tensor)
    taken.args = (taken.args[0].args[0], *taken.args[1:])


MUTANTS = {
    "reduction dropped": (ZOO["gpt"], 2, _drop_reduction),
    "bias before the reduction": (ZOO["gpt"], 2, _bias_before_the_reduction),
    "wrong kv head": (ZOO["heads inferred"], 2, _wrong_kv_head),
    "moment counts shared positions twice": (STYLES["olmo2"], 3, _part_counted_twice),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name: str) -> None:
    build, world_size, mutate = MUTANTS[name]
    case = served(build())
    found = divided(case, world_size)
    assert error(case, found) < FLOAT32
    hit = 0
    for part in found.parts:
        try:
            mutate(part.body.part.graph)
            hit += 1
        except StopIteration:  # this rank holds nothing that could be broken
            continue
        part.body.part.graph.lint()
    assert hit
    if name == "reduction dropped":
        assert all(len(_reductions(p.body.modules)) > 1 for p in found.parts)
    assert error(case, found) > 1e-4


def _reductions(modules: object) -> list[nn.Module]:
    return [m for m in dict(modules).values() if isinstance(m, ReduceFrom)]  # type: ignore[call-overload]


def test_mutant_wrong_sinks_is_caught() -> None:
    case = served(OSS())
    found = divided(case, 2)
    _sinks_of_rank_0(found)
    assert error(case, found) > 1e-4
