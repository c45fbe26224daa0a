"""Dynamo's graph lowered to ATen: same vocabulary as export, same results, same gradients."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._dynamo.backends.debugging import aot_eager
from torch._ops import HigherOrderOperator, OpOverload
from torch.utils.checkpoint import checkpoint

from fxport.capture.dynamo import Lowered, lower, lowered_graphs
from fxport.capture.inputs import GraphInput, InputKind
from fxport.errors import ReasonCode
from fxport.passes.pipeline import PipelineResult, training_pipeline

aten = torch.ops.aten


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Recorder:
    """A backend that runs what `lower` made of the graph."""

    def __init__(self, *, through_aot: bool = False) -> None:
        self.lowered: list[Lowered] = []
        self.originals: list[fx.GraphModule] = []
        self._through_aot = through_aot

    def __call__(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        self.originals.append(gm)
        result = lower(gm)
        self.lowered.append(result)
        for graph in lowered_graphs(result.graph):
            graph.graph.lint()
        return aot_eager(result.graph, example_inputs) if self._through_aot else _Checked(result)

    @property
    def graph(self) -> fx.Graph:
        return self.lowered[-1].graph.graph


class _Checked(fx.Interpreter):
    """Runs the lowered graph; every value must be what ``meta["val"]`` says it is."""

    def __init__(self, lowered: Lowered) -> None:
        super().__init__(lowered.graph, garbage_collect_values=False)

    def __call__(self, *args: Any) -> Any:
        return self.run(*args)

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        fake = n.meta.get("val")
        if isinstance(result, Tensor) and n.op != "output":
            assert isinstance(fake, Tensor), n
            assert fake.dtype == result.dtype, n
            assert _agree(fake.shape, result.shape), n
            assert _agree(fake.stride(), result.stride()), n
        return result


def _agree(fake: Sequence[int | torch.SymInt], real: Sequence[int]) -> bool:
    hints = [f if isinstance(f, int) else f.node.hint for f in fake]
    # Sizes known only at run time have no hint.
    return len(hints) == len(real) and all(h in (None, r) for h, r in zip(hints, real, strict=True))


def _in_vocabulary(node: fx.Node) -> bool:
    return (
        node.op in ("placeholder", "get_attr", "output")
        or isinstance(node.target, OpOverload | HigherOrderOperator)
        or getattr(operator, getattr(node.target, "__name__", ""), None) is node.target
    )


def targets(graph: fx.Graph) -> list[Any]:
    return [n.target for n in graph.nodes if n.op in ("call_function", "call_method")]


def leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes
    ]


def outputs_and_grads(fn: Callable[..., Any], inputs: list[Tensor]) -> list[Tensor]:
    out = fn(*inputs)
    flat = [o for o in (out if isinstance(out, tuple | list) else [out]) if o is not None]
    total = sum((o.double() * torch.cos(o.detach().double())).sum() for o in flat)
    return [*flat, *torch.autograd.grad(total, inputs, allow_unused=True)]


def assert_same(fn: Callable[..., Any], inputs: list[Tensor], dynamic: bool | None) -> Recorder:
    recorder = Recorder()
    compiled = torch.compile(fn, backend=recorder, dynamic=dynamic, fullgraph=True)
    torch.manual_seed(1)
    expected = outputs_and_grads(fn, inputs)
    torch.manual_seed(1)
    actual = outputs_and_grads(compiled, inputs)
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=0, equal_nan=True)
    return recorder


def _heads(x: Tensor, w: Tensor) -> Tensor:
    b, t, _ = x.shape
    q, k, v = F.linear(x, w).split(w.size(0) // 3, dim=2)
    q, k, v = (y.view(b, t, 2, -1).transpose(1, 2) for y in (q, k, v))
    att = (q @ k.transpose(-2, -1)) / q.size(-1) ** 0.5
    mask = torch.ones(t, t, dtype=torch.bool).tril()
    att = F.softmax(att.masked_fill(~mask, float("-inf")), dim=-1)
    return (F.dropout(att, 0.25) @ v).transpose(1, 2).contiguous().view(b, t, -1)


def _pieces(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    a, b = (x @ w).chunk(2, dim=-1)
    c, d = torch.unbind(torch.stack([a, b]), 0)
    values, indices = torch.max(c * d, dim=1)
    return torch.cat((a, d, b), -1), values * indices, torch.einsum("btd,bsd->bts", a, b)


def _norm_and_silu(x: Tensor, w: Tensor) -> Tensor:
    y = F.layer_norm(x, (x.size(-1),), w[0], w[1])
    y = F.silu(y) * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
    return F.gelu(y, approximate="tanh").to(torch.float32).to(torch.float64)[..., None, 1:]


def _in_place(x: Tensor, w: Tensor) -> Tensor:
    y = x @ w
    view = y[:, 1:]
    view += 2  # writes through to y
    y.mul_(3)  # and y through to view
    y[:, 0] = 0.5
    y.view(-1).add_(1)
    view.masked_fill_(view > 4, 0.0)
    return y + view.sum()


def _sizes(x: Tensor, w: Tensor) -> Tensor:
    b, t = x.size(0), x.shape[1]
    scale = 1.0 / t**0.5
    position = torch.arange(t, dtype=x.dtype)
    y = (x * position[:, None]).reshape(b * t, -1) @ w
    return y.view(b, t, -1) * scale + torch.full((t, 1), 2.0, dtype=x.dtype) / (b + t)


def _sdpa(x: Tensor, w: Tensor) -> Tensor:
    q = x.unsqueeze(1).expand(-1, 4, -1, -1)
    k = (x @ w[:6, :6]).unsqueeze(1).repeat_interleave(4, dim=1)
    return F.scaled_dot_product_attention(q, k, k, is_causal=True)


CASES: list[tuple[Callable[..., Any], list[tuple[int, ...]], list[Any]]] = [
    (_heads, [(2, 7, 6), (24, 6)], [aten.softmax.int, aten.dropout.default, aten.split.Tensor]),
    (_pieces, [(2, 7, 6), (6, 10)], [aten.chunk.default, aten.einsum.default, aten.max.dim]),
    (_norm_and_silu, [(2, 7, 6), (2, 6)], [aten.layer_norm.default, aten.gelu.default]),
    (_in_place, [(2, 7, 6), (6, 5)], [aten.add_.Tensor, aten.mul_.Tensor, aten.fill_.Tensor]),
    (_sizes, [(2, 7, 6), (6, 5)], [aten.arange.start_step, aten.full.default]),
    (_sdpa, [(2, 7, 6), (6, 6)], [aten.scaled_dot_product_attention.default]),
]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("fn", "shapes", "wanted"), CASES, ids=[c[0].__name__ for c in CASES])
def test_lowered_graph_is_aten_and_equals_eager(
    fn: Callable[..., Any], shapes: list[tuple[int, ...]], wanted: list[Any], dynamic: bool
) -> None:
    recorder = assert_same(fn, leaves(*shapes), dynamic)
    assert recorder.lowered[0].decisions == ()
    foreign = [n for n in recorder.graph.nodes if not _in_vocabulary(n)]
    assert not foreign
    assert all("val" in n.meta for n in recorder.graph.nodes if n.op != "output")
    found = targets(recorder.graph)
    for target in wanted:
        packets = {t.overloadpacket for t in found if isinstance(t, OpOverload)}
        assert target in found or target.overloadpacket in packets, target


def test_dropout_keeps_its_training_flag() -> None:
    recorder = assert_same(_heads, leaves((2, 7, 6), (24, 6)), False)
    (dropout,) = recorder.graph.find_nodes(op="call_function", target=aten.dropout.default)
    assert dropout.args[1:] == (0.25, True)


def test_user_lines_are_kept() -> None:
    recorder = assert_same(_heads, leaves((2, 7, 6), (24, 6)), False)
    for node in recorder.graph.nodes:
        if node.op == "call_function":
            assert "test_dynamo_lowering.py" in node.meta["stack_trace"], node


def test_input_changed_in_place() -> None:
    def fn(x: Tensor, y: Tensor) -> Tensor:
        x.add_(y)
        x[0].zero_()
        return x * y

    recorder = Recorder()
    compiled = torch.compile(fn, backend=recorder)
    x, y = (t.detach() for t in leaves((3, 5), (3, 5)))
    x_eager = x.clone()
    expected = fn(x_eager, y)
    torch.testing.assert_close(compiled(x, y), expected, rtol=0, atol=0)
    torch.testing.assert_close(x, x_eager, rtol=0, atol=0)


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(6, 6)
        self.own = nn.Parameter(torch.full((6,), 0.5))
        self.register_buffer("table", torch.arange(60.0).view(10, 6))
        self.plain = torch.ones(6)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.softmax(self.proj(x) * self.own + self.table[: x.size(1)], -1)
        return y + self.plain


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([Part() for _ in range(2)])
        self.embed = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.checkpointed = False

    def forward(self, tokens: Tensor, extra: dict[str, Tensor]) -> Tensor:
        x = self.embed(tokens) + extra["bias"]
        for part in self.parts:
            x = checkpoint(part, x, use_reentrant=False) if self.checkpointed else part(x)
        return self.head(x)


def _whole() -> tuple[Whole, Tensor, dict[str, Tensor]]:
    torch.manual_seed(0)
    return Whole(), torch.randint(0, 11, (2, 7)), {"bias": torch.randn(6)}


def test_inputs_carry_the_names_that_the_user_knows() -> None:
    model, tokens, extra = _whole()
    recorder = Recorder()
    torch.compile(model, backend=recorder)(tokens, extra)
    inputs = [n.meta["input"] for n in recorder.graph.find_nodes(op="placeholder")]
    kinds = {i.name: i.kind for i in inputs}
    assert kinds == {
        "tokens": InputKind.DATA,
        "extra.bias": InputKind.DATA,
        "embed.weight": InputKind.PARAMETER,  # the tied head has no placeholder of its own
        **{
            f"parts.{i}.{name}": kind
            for i in range(2)
            for name, kind in (
                ("proj.weight", InputKind.PARAMETER),
                ("proj.bias", InputKind.PARAMETER),
                ("own", InputKind.PARAMETER),
                ("table", InputKind.BUFFER),
                ("plain", InputKind.BUFFER),
            )
        },
    }
    by_name: dict[str, GraphInput] = {i.name: i for i in inputs}
    assert by_name["parts.1.table"].value is model.parts[1].table
    assert by_name["embed.weight"].value is model.embed.weight


def test_checkpoint_stays_and_its_body_is_lowered() -> None:
    model, tokens, extra = _whole()
    model.checkpointed = True
    recorder = Recorder(through_aot=True)
    compiled = torch.compile(model, backend=recorder)
    loss = model(tokens, extra).square().sum()
    expected = torch.autograd.grad(loss, list(model.parameters()))
    actual = torch.autograd.grad(compiled(tokens, extra).square().sum(), list(model.parameters()))
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-6)
    hop = torch.ops.higher_order.tag_activation_checkpoint
    assert targets(recorder.graph).count(hop) == 2
    *bodies, _ = lowered_graphs(recorder.lowered[0].graph)
    assert len(bodies) == 2
    for index, body in enumerate(bodies):
        assert aten.softmax.int in targets(body.graph)
        assert all(_in_vocabulary(n) for n in body.graph.nodes)
        names = {n.meta["input"].name for n in body.graph.find_nodes(op="placeholder")}
        assert f"parts.{index}.table" in names
    # Dynamo's own graph is what it was.
    assert torch._C._nn.linear in targets(recorder.originals[0].wrap_body_0.graph)


class Tripled(torch.autograd.Function):
    """Backward is three times what differentiating forward would give."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.softmax(x, -1) * 0 + x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 6 * grad + 0 * x


@pytest.mark.parametrize("through_aot", [False, True])
def test_custom_backward_survives(through_aot: bool) -> None:
    recorder = Recorder(through_aot=through_aot)
    (x,) = leaves((3, 5))
    compiled = torch.compile(lambda x: Tripled.apply(x.sin()), backend=recorder)
    (grad,) = torch.autograd.grad(compiled(x).sum(), x)
    torch.testing.assert_close(grad, 6 * x.cos())
    forward, _backward, _ = lowered_graphs(recorder.lowered[0].graph)
    assert aten.softmax.int in targets(forward.graph)


def test_autocast_and_no_grad_regions_stay() -> None:
    def fn(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            y = F.linear(x, w)
            p = torch.softmax(y, -1)
        with torch.no_grad():
            frozen = (x * 2).sum()
        return p.float() @ w * frozen, y

    inputs = [t.detach().float().requires_grad_() for t in leaves((4, 6), (6, 6))]
    recorder = assert_same(fn, inputs, False)
    (linear,) = recorder.graph.find_nodes(op="call_function", target=aten.linear.default)
    assert linear.meta["val"].dtype == torch.bfloat16
    assert targets(recorder.graph).count(torch._C._set_grad_enabled) == 2
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")


@torch._dynamo.allow_in_graph
def _shy(x: Tensor) -> Tensor:
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    if get_proxy_mode() is not None:
        raise RuntimeError("not while somebody traces")
    return x.sin()


def test_a_call_that_cannot_be_traced_stays_and_is_named() -> None:
    recorder = assert_same(lambda x, w: _shy(x @ w).cos(), leaves((3, 5), (5, 4)), False)
    (decision,) = recorder.lowered[0].decisions
    assert decision.reason is not None
    assert decision.reason.code is ReasonCode.UNSUPPORTED_OP
    assert "_shy" in decision.reason.message
    assert "not while somebody traces" in decision.reason.message
    assert decision.location is not None
    assert decision.location.file.endswith("test_dynamo_lowering.py")
    assert targets(recorder.graph) == [aten.matmul.default, _shy, aten.cos.default]


def test_sizes_known_only_at_run_time_stay() -> None:
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        recorder = assert_same(lambda x: x[x > 0].exp().sum(), leaves((3, 5)), False)
    assert recorder.lowered[0].decisions == ()
    assert aten.exp.default in targets(recorder.graph)


def test_a_shape_changed_in_place_leaves_the_graph_alone() -> None:
    def fn(x: Tensor) -> Tensor:
        y = x * 2
        y.t_()
        return y.contiguous()

    torch.manual_seed(0)
    x = torch.randn(4, 4)
    recorder = Recorder(through_aot=True)
    torch.testing.assert_close(torch.compile(fn, backend=recorder)(x), fn(x))
    (decision,) = recorder.lowered[0].decisions
    assert decision.reason is not None
    assert decision.reason.code is ReasonCode.MUTATED_IN_PLACE
    assert recorder.lowered[0].graph is recorder.originals[0]


def test_no_pass_looks_at_a_graph_that_was_left_alone() -> None:
    def part(x: Tensor) -> Tensor:
        y = x.sin()
        y.t_()
        return y.contiguous()

    def fn(x: Tensor, w: Tensor) -> Tensor:
        return checkpoint(part, x @ w, use_reentrant=False)

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        lowered = lower(gm)
        assert lowered.graph is gm
        before = str(gm.graph)
        assert training_pipeline(lowered.graph) == PipelineResult((), ())
        assert str(gm.graph) == before
        return aot_eager(gm, example_inputs)

    x, w = leaves((4, 4), (4, 4))
    result = torch.compile(fn, backend=backend)(x, w)
    torch.testing.assert_close(result, fn(x, w))
