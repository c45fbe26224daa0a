"""Training through ``torch.compile(model, backend="vllm_generic")`` equals eager, and is flash.

Most of the time goes into Inductor's C++ compiler, so tests share compiled models.
"""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.utils import counters
from torch._inductor import metrics
from torch._inductor.custom_graph_pass import CustomGraphPass

from fxport.backends.inductor import compile_with_inductor
from fxport.capture.dynamo import lower
from fxport.errors import FxportError, FxportWarning, PortError
from fxport.passes.pipeline import training_pipeline
from tests.backends.models_training import GPT, Llama, Sizes

ATTENTION = torch.ops.fxport.attention.default
SIZES = Sizes()


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error", FxportWarning)
        yield
    torch._dynamo.reset()


class Graphs(CustomGraphPass):
    """Collects the graphs, forward and backward, that Inductor is about to generate code for."""

    def __init__(self) -> None:
        self.seen: list[fx.Graph] = []

    def __call__(self, graph: fx.Graph) -> None:
        self.seen.append(copy.copy(graph))

    def uuid(self) -> None:
        return None  # never served from a cache

    def options(self, **more: Any) -> dict[str, Any]:
        return {"inductor": {"post_grad_custom_post_pass": self}, **more}

    def count(self, target: Any) -> list[int]:
        return [len(g.find_nodes(op="call_function", target=target)) for g in self.seen]

    def with_two_lengths(self, length: int) -> list[fx.Node]:
        """Computed values that have the length in two of their dimensions."""
        return [
            n
            for g in self.seen
            for n in g.nodes
            if n.op == "call_function"
            for value in _tensors(n.meta.get("val"))
            if sum(_hint(s) == length for s in value.shape) > 1
        ]


def _tensors(value: Any) -> list[Tensor]:
    values = value if isinstance(value, tuple | list) else [value]
    return [v for v in values if isinstance(v, Tensor)]


def _hint(size: int | torch.SymInt) -> int:
    return size if isinstance(size, int) else size.node.hint


def batch(length: int, rows: int = 2, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, SIZES.vocab, (rows, length + 1), generator=generator)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def build(kind: type[nn.Module], sizes: Sizes = SIZES, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return kind(sizes, **options)


def step(call: Callable[..., Any], model: nn.Module, *inputs: Tensor) -> dict[str, Tensor]:
    """Outputs and the gradient of every parameter for one training step."""
    model.zero_grad()
    result = call(*inputs)
    outputs = result if isinstance(result, tuple) else (result, result.square().mean())
    outputs[-1].backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert len(grads) == len(list(model.parameters()))
    return {**{f"output {i}": o.detach() for i, o in enumerate(outputs)}, **grads}


def relative(actual: Tensor, expected: Tensor) -> float:
    difference = (actual.double() - expected.double()).norm()
    return float(difference / expected.double().norm().clamp_min(1e-12))


def assert_equal_steps(
    compiled: Callable[..., Any], model: nn.Module, inputs: tuple[Tensor, ...], bound: float = 1e-5
) -> None:
    expected = step(model, model, *inputs)
    actual = step(compiled, model, *inputs)
    errors = {n: relative(actual[n], expected[n]) for n in expected}
    assert max(errors.values()) < bound, errors


def test_gpt_at_changing_lengths_in_train_and_eval() -> None:
    model = build(GPT, Sizes(limit=256))
    graphs = Graphs()
    compiled = torch.compile(model, backend="vllm_generic", options=graphs.options(strict=True))
    assert_equal_steps(compiled, model, batch(17))  # compiled for this length
    assert graphs.count(ATTENTION) == [SIZES.layers, 0]  # backward recomputes none
    assert graphs.with_two_lengths(17) == []
    assert_equal_steps(compiled, model, batch(211))  # compiled for every length
    assert graphs.count(ATTENTION) == [SIZES.layers, 0] * 2
    assert graphs.with_two_lengths(211) == []
    for length in (29, 11):
        assert_equal_steps(compiled, model, batch(length, seed=length))
    assert len(graphs.seen) == 4
    model.eval()
    with torch.no_grad():
        for length in (17, 29):
            tokens, _ = batch(length)
            actual, expected = compiled(tokens)[0], model(tokens)[0]
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_gradients_accumulate() -> None:
    model = build(Llama, Sizes(heads=4, width=32))
    compiled = torch.compile(model, backend="vllm_generic", options={"strict": True}, dynamic=True)
    assert_equal_steps(compiled, model, batch(17)[:1])
    sums = []
    for call in (model, compiled):
        model.zero_grad()
        for micro, length in enumerate((13, 29, 21)):
            tokens, targets = batch(length, rows=3, seed=micro)
            F.cross_entropy(call(tokens).flatten(0, 1), targets.flatten()).div(3).backward()
        sums.append([p.grad.clone() for p in model.parameters()])
    assert max(relative(a, e) for e, a in zip(*sums, strict=True)) < 1e-5


def test_checkpoint_and_custom_backward_survive() -> None:
    model = build(GPT, checkpointed=True, custom=True)
    graphs = Graphs()
    compiled = torch.compile(model, backend="vllm_generic", options=graphs.options(strict=True))
    assert_equal_steps(compiled, model, batch(17))
    # Recomputed in backward: that is what the checkpoint is for.
    assert graphs.count(ATTENTION) == [SIZES.layers, SIZES.layers]
    without = build(GPT)
    wanted = step(model, model, *batch(17))["wpe.weight"]
    assert relative(step(without, without, *batch(17))["wpe.weight"], wanted) > 0.1


def test_autocast_is_no_less_exact_than_eager_autocast() -> None:
    model = build(GPT)
    inputs = batch(19)
    compiled = torch.compile(model, backend="vllm_generic", options={"strict": True})
    exact = step(model, model, *inputs)
    with torch.autocast("cpu", torch.bfloat16):
        eager = step(model, model, *inputs)
        ours = step(compiled, model, *inputs)
    # bfloat16 keeps 8 bits: each result is within 2**-8 of its neighbours, some 10 ops deep.
    for name, reference in exact.items():
        assert relative(ours[name], reference) < 1.5 * relative(eager[name], reference) + 2**-8
        assert relative(ours[name], eager[name]) < 10 * 2**-8, name


class Uniform(nn.Module):
    """Attention whose output is its own weights after dropout: all scores 0, v the identity."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(p)
        self.scale = nn.Parameter(torch.zeros(1))

    def forward(self, v: Tensor) -> Tensor:
        T = v.size(-2)
        mask = torch.ones(T, T, dtype=torch.bool).tril()
        scores = (self.scale * v) @ v.transpose(-2, -1)
        weights = F.softmax(scores.masked_fill(~mask, float("-inf")), dim=-1)
        return self.dropout(weights) @ v


def test_dropout_has_eager_s_distribution() -> None:
    rows, heads, length, p = 4, 3, 64, 0.3
    model = Uniform(p)
    compiled = torch.compile(model, backend="vllm_generic", options={"strict": True})
    v = torch.eye(length).expand(rows, heads, length, length).clone()
    for call in (model, compiled):
        torch.manual_seed(3)
        weights = call(v)
        below = torch.ones(length, length, dtype=torch.bool).tril().expand_as(weights)
        expected = (1 / (1 - p) / torch.arange(1, length + 1.0))[:, None].expand_as(weights)
        kept = weights[below] != 0
        torch.testing.assert_close(weights[below][kept], expected[below][kept])
        assert not weights[~below].any()
        sigma = (p * (1 - p) / kept.numel()) ** 0.5
        assert abs((~kept).float().mean().item() - p) < 4 * sigma
    torch.manual_seed(3)
    again = compiled(v)
    torch.testing.assert_close(again, weights, rtol=0, atol=0)
    assert not torch.equal(compiled(v), weights)
    model.eval()
    torch.testing.assert_close(compiled(v), model(v))


def test_dropout_is_the_same_in_the_recomputed_forward() -> None:
    model = build(GPT, Sizes(dropout=0.3), checkpointed=True).double()
    compiled = torch.compile(model, backend="vllm_generic", options={"strict": True})
    inputs = batch(17)

    def loss() -> Tensor:
        torch.manual_seed(7)
        return compiled(*inputs)[1]

    loss().backward()
    direction = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    slope = sum((p.grad * direction[n]).sum() for n, p in model.named_parameters())
    epsilon = 1e-5
    sides = []
    for shift in (epsilon, -2 * epsilon):
        with torch.no_grad():
            for n, p in model.named_parameters():
                p += shift * direction[n]
        sides.append(loss().detach())
    numeric = (sides[0] - sides[1]) / (2 * epsilon)
    torch.testing.assert_close(slope, numeric, rtol=1e-6, atol=1e-8)


class Broken(nn.Module):
    """A graph break between two attentions."""

    def __init__(self) -> None:
        super().__init__()
        self.model = build(GPT)

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
        x = self.model.wte(idx)
        for number, block in enumerate(self.model.h):
            if number == 2:
                torch._dynamo.graph_break()
            x = block(x)
        logits = self.model.lm_head(self.model.ln_f(x))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten()) + 0 * (
            self.model.wpe.weight.sum()
        )


def test_graph_breaks() -> None:
    model = Broken()
    compiled = torch.compile(model, backend=door_without_codegen)
    inputs = batch(17)
    expected = step(lambda *a: (model(*a),), model, *inputs)
    actual = step(lambda *a: (compiled(*a),), model, *inputs)
    assert max(relative(actual[n], expected[n]) for n in expected) < 1e-5


def test_a_graph_break_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxport.backends.dynamo.compile_with_inductor", lambda gm, *_: gm.forward)

    def attend(q: Tensor, broken: bool) -> Tensor:
        out = (q @ q.mT).softmax(-1) @ q
        if broken:
            torch._dynamo.graph_break()  # BREAK
        return out * 2

    q = torch.randn(1, 2, 5, 16)
    torch.compile(attend, backend="vllm_generic")(q, False)  # a warning would be an error
    with pytest.warns(
        FxportWarning, match=r"test_dynamo\.py:\d+: torch.compile breaks the graph"
    ) as w:
        torch.compile(attend, backend="vllm_generic")(q, True)
    assert "# BREAK" in str(w[0].message)
    with pytest.raises(PortError, match="breaks the graph"):
        torch.compile(attend, backend="vllm_generic", options={"strict": True})(q, True)


def test_attention_that_runs_eagerly_is_an_error_if_strict(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo leaves the whole of such a block to Python, and no backend sees what is in it."""
    monkeypatch.setattr("fxport.backends.dynamo.compile_with_inductor", lambda gm, *_: gm.forward)

    def attend(q: Tensor) -> Tensor:
        k = q * 0.5
        with torch.autograd.graph.save_on_cpu():
            out = (q @ k.mT).softmax(-1) @ q
        return out

    q = torch.randn(1, 2, 5, 16, requires_grad=True)
    with pytest.raises(PortError, match=r"test_dynamo\.py:\d+: torch.compile breaks the graph"):
        torch.compile(attend, backend="vllm_generic", options={"strict": True})(q)


class Encoder(nn.Module):
    """torch's own layers are given a mask alone, and ask its values whether it is causal."""

    def __init__(self, kind: str, diagonal: int) -> None:
        super().__init__()
        self.wte, self.diagonal = nn.Embedding(SIZES.vocab, 16), diagonal
        sizes = {"dim_feedforward": 24, "dropout": 0.0, "batch_first": True}
        if kind == "encoder":
            layer = nn.TransformerEncoderLayer(16, 2, **sizes)
            self.layers = nn.TransformerEncoder(layer, 4)
        else:
            self.layers = nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 2, **sizes), 4)

    def forward(self, ids: Tensor) -> Tensor:
        x, length = self.wte(ids), ids.shape[1]
        mask = torch.full((length, length), -torch.inf, dtype=x.dtype).triu(self.diagonal)
        encoder = isinstance(self.layers, nn.TransformerEncoder)
        out = self.layers(x, mask) if encoder else self.layers(x, x, mask, mask)
        return F.linear(out, self.wte.weight)


@pytest.mark.parametrize(("kind", "count"), [("encoder", 4), ("decoder", 8)])
@pytest.mark.parametrize("diagonal", [1, 3])
def test_layers_that_ask_whether_a_mask_is_causal(kind: str, count: int, diagonal: int) -> None:
    """In one graph; a mask that lets two later tokens through stays a bias."""
    torch.manual_seed(0)
    model = Encoder(kind, diagonal).double()
    found: list[str] = []

    def door(gm: fx.GraphModule, _: Any) -> Any:
        graph = lower(gm).graph
        found.extend(d.detail for d in training_pipeline(graph).decisions if d.detail)
        return graph.forward

    inputs = batch(11)[:1]
    expected = step(model, model, *inputs)
    actual = step(torch.compile(model, backend=door, fullgraph=True), model, *inputs)
    assert max(relative(actual[n], expected[n]) for n in expected) < 1e-12
    assert len(found) == count
    assert all(("causal" in f) == (diagonal == 1) for f in found), found


def test_the_graph_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """With all nodes that were erased from it, it would stay as long as the compiled code."""
    seen: list[weakref.ref[fx.GraphModule]] = []

    def noting(gm: fx.GraphModule) -> Any:
        found = lower(gm)
        seen.append(weakref.ref(found.graph))
        return found

    monkeypatch.setattr("fxport.backends.dynamo.lower", noting)
    q = torch.randn(1, 2, 5, 16)
    compiled = torch.compile(lambda q: (q @ q.mT).softmax(-1) @ q, backend="vllm_generic")
    torch.testing.assert_close(compiled(q), (q @ q.mT).softmax(-1) @ q)
    gc.collect()
    assert len(seen) == 1 and seen[0]() is None


def permuted_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.permute(0, 2, 3, 1) * 0.3, -1) @ v


def _bare_inductor(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
    return compile_with_inductor(gm, example_inputs, {})


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("backend", ["vllm_generic", _bare_inductor])
def test_inductor_does_not_fuse_behind_us(backend: Any, grad: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 8, 8, 16, generator=generator) for _ in range(3))
    if grad:
        q, k, v = (t.requires_grad_() for t in (q, k, v))
    expected = permuted_keys(q, k, v)
    # The fault is there: else this test would have nothing to show.
    wrong = torch.compile(permuted_keys, backend="inductor")(q, k, v)
    assert (wrong - expected).abs().max() > 0.1
    torch._dynamo.reset()
    counters.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FxportWarning)
        actual = torch.compile(permuted_keys, backend=backend)(q, k, v)
    assert counters["inductor"]["fuse_attention"] == 0
    torch.testing.assert_close(actual, expected)
    if grad:
        grads = [torch.autograd.grad(o.square().sum(), (q, k, v)) for o in (actual, expected)]
        for a, e in zip(*grads, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


def test_inductor_options_and_other_patterns_stay() -> None:
    seen: list[str] = []

    def theirs(graph: fx.Graph) -> None:
        seen.append("fxport" if any("fxport" in str(n.target) for n in graph.nodes) else "aten")

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(x.exp(), y)

    options = {"inductor": {"joint_custom_pre_pass": theirs, "joint_custom_post_pass": theirs}}
    x, y = torch.randn(6, 9, requires_grad=True), torch.arange(6)
    metrics.reset()
    actual = torch.compile(loss, backend="vllm_generic", options=options)(x, y)
    assert seen == ["aten", "aten"]  # a user's passes never meet our name for exp
    assert metrics.num_matches_for_scatter_upon_const_tensor == 1  # no one-hot [B * T, V]
    torch.testing.assert_close(actual, loss(x, y))
    grads = [torch.autograd.grad(o, x)[0] for o in (actual, loss(x, y))]
    torch.testing.assert_close(*grads)


class Watched(nn.Module):
    """Returns its attention weights: they must exist, so nothing can be rewritten."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        weights = torch.softmax(q @ k.transpose(1, 2) / 8**0.5, dim=-1)
        return weights @ v, weights


def test_what_is_left_is_said_once() -> None:
    torch.manual_seed(0)
    model, x = Watched(), torch.randn(2, 5, 8)
    graphs = Graphs()
    with pytest.warns(FxportWarning) as caught:
        compiled = torch.compile(model, backend="vllm_generic", options=graphs.options())
        actual = compiled(x)
        compiled(x)
    assert len(caught) == 1
    assert "test_dynamo.py" in str(caught[0].message)
    for a, e in zip(actual, model(x), strict=True):
        torch.testing.assert_close(a, e)
    assert graphs.with_two_lengths(5)  # the measure of the test above does see them


def test_strict_refuses_what_would_be_left() -> None:
    compiled = torch.compile(Watched(), backend="vllm_generic", options={"strict": True})
    with pytest.raises(PortError, match=r"test_dynamo\.py:\d+") as caught:
        compiled(torch.randn(2, 5, 8))
    assert "weights = torch.softmax" in str(caught.value)
    assert len(caught.value.reasons) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strickt": True}, "no option 'strickt'"),
        ({"strict": "yes"}, "'strict' is a bool"),
        ({"inductor": {"max_autotoon": True}}, "no option max_autotoon"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    compiled = torch.compile(lambda x: x + 1, backend="vllm_generic", options=options)
    with pytest.raises(Exception, match=message):
        compiled(torch.ones(2))


def test_a_changed_mask_is_noticed() -> None:
    model = build(GPT)
    compiled = torch.compile(model, backend="vllm_generic")
    inputs = batch(17)
    before = compiled(*inputs)[1]
    mask = model.h[2].attn.bias

    model.load_state_dict(copy.deepcopy(model.state_dict()))  # same values, written again
    torch.testing.assert_close(compiled(*inputs)[1], before, rtol=0, atol=0)
    model.h[2].attn.bias = mask.clone()  # another tensor with the same values
    torch.testing.assert_close(compiled(*inputs)[1], before, rtol=0, atol=0)

    model.h[2].attn.bias[..., 5, 3] = 0
    with pytest.raises(FxportError, match=r"buffer 'h\.2\.attn\.bias' has changed"):
        compiled(*inputs)
    model.h[2].attn.bias = mask
    torch.testing.assert_close(compiled(*inputs)[1], before, rtol=0, atol=0)

    mask[..., 5, 3] = 0
    torch._dynamo.reset()
    with pytest.warns(FxportWarning, match="the mask stays a dense tensor"):
        after = compiled(*inputs)[1]
    torch.testing.assert_close(after, model(*inputs)[1])
    assert abs(after - before) > 1e-4


def door_without_codegen(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
    """Everything but Inductor's C++: where that is not the question, it takes too long."""
    lowered = lower(gm)
    assert training_pipeline(lowered.graph).sites
    return aot_eager(lowered.graph, example_inputs)


def test_float64_after_float32() -> None:
    model = build(GPT)
    compiled = torch.compile(model, backend=door_without_codegen)
    assert_equal_steps(compiled, model, batch(17))
    model.double()
    assert_equal_steps(compiled, model, batch(19), bound=1e-12)
    assert_equal_steps(compiled, model, batch(23), bound=1e-12)
    assert_equal_steps(compiled, model, batch(SIZES.limit), bound=1e-12)


def test_found_without_importing_fxport() -> None:
    program = (
        "import sys, torch\n"
        "assert not any(m.split('.')[0] == 'fxport' for m in sys.modules)\n"
        "f = torch.compile(lambda x: x.sin() * 2, backend='vllm_generic')\n"
        "x = torch.ones(3)\n"
        "torch.testing.assert_close(f(x), x.sin() * 2)\n"
        "print('vllm_generic' in torch._dynamo.list_backends())\n"
        "print(sorted(m for m in ('vllm', 'transformers', 'triton') if m in sys.modules))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[0] == "True"
