"""What is trained of a capture has the original's gradients, or says why it cannot be trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fxport

VOCAB, WIDTH, HEADS, LAYERS = 61, 24, 3, 4


class Attention(nn.Module):
    """Causal attention, in parts that a step may put together."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        cache = torch.zeros(4, HEADS, 32, WIDTH // HEADS)
        self.register_buffer("keys", cache, persistent=False)
        self.register_buffer("values", cache.clone(), persistent=False)

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, t, _ = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        return q, k, v

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        t = q.shape[2]
        allowed = torch.ones(t, t, dtype=torch.bool, device=q.device).tril()
        s = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        return s.masked_fill(~allowed, float("-inf"))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(x)
        return self.end(self.scores(q, k).softmax(-1), v)

    def end(self, weights: Tensor, v: Tensor) -> Tensor:
        return self.out((weights @ v).transpose(1, 2).flatten(2))


Step = Callable[[Attention, Tensor], Tensor]


class Model(nn.Module):
    def __init__(self, step: Step) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB, bias=False)
        self.layers = nn.ModuleList(Attention() for _ in range(LAYERS))
        self.step = step

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = x + self.step(layer, x)
        return self.head(x)


def under_no_grad(layer: Attention, x: Tensor) -> Tensor:
    """As a recursive model refines its state."""
    with torch.no_grad():
        first = x + layer(x)
    return layer(first + 0.5 * x)


@torch.no_grad()
def _decorated(layer: Attention, x: Tensor) -> Tensor:
    with torch.enable_grad():
        again = layer(x)
    return layer(again)


def decorated(layer: Attention, x: Tensor) -> Tensor:
    return _decorated(layer, x) * layer(x).sigmoid()


def switched_by_turns(layer: Attention, x: Tensor) -> Tensor:
    for turn in range(3):
        with torch.set_grad_enabled(turn != 1):
            x = layer(x) if turn != 1 else x + layer(x)
    torch.set_grad_enabled(False)
    x = x + 0 * layer(x)
    torch.set_grad_enabled(True)
    return x + layer(x)


def only_values_learn(layer: Attention, x: Tensor) -> Tensor:
    q, k, v = layer.parts(x)
    with torch.no_grad():
        weights = layer.scores(q, k).softmax(-1)
    return layer.end(weights, v)


def only_scores_are_detached(layer: Attention, x: Tensor) -> Tensor:
    q, k, v = layer.parts(x)
    return layer.end(layer.scores(q, k).detach().softmax(-1), v)


def weights_are_detached(layer: Attention, x: Tensor) -> Tensor:
    q, k, v = layer.parts(x)
    return layer.end(layer.scores(q, k).softmax(-1).detach(), v)


def less_the_detached_maximum(layer: Attention, x: Tensor) -> Tensor:
    q, k, v = layer.parts(x)
    s = layer.scores(q, k)
    e = (s - s.detach().amax(-1, keepdim=True)).exp()
    return layer.end(e / e.sum(-1, keepdim=True), v)


def less_the_maximum_of_all(layer: Attention, x: Tensor) -> Tensor:
    q, k, v = layer.parts(x)
    s = layer.scores(q, k)
    return layer.end((s - s.max().detach()).softmax(-1), v)


def keys_do_not_learn(layer: Attention, x: Tensor) -> Tensor:
    q, _, v = layer.parts(x)
    with torch.no_grad():
        k = layer.parts(x)[1]
    return layer.end(layer.scores(q, k).softmax(-1), v)


def tables_need_none(layer: Attention, x: Tensor) -> Tensor:
    with torch.no_grad():
        angles = torch.outer(torch.arange(x.shape[1]), 0.1 ** torch.arange(WIDTH))
    return layer(x + angles.to(x.dtype).sin())


def computed_again(layer: Attention, x: Tensor) -> Tensor:
    """The older checkpoint runs under `torch.no_grad` first; what does so inside of it stays so."""
    again = checkpoint(only_values_learn, layer, x, use_reentrant=True)
    return again + checkpoint(layer, x, use_reentrant=True)


def kept(cache: Tensor, x: Tensor) -> Tensor:
    rows, _, length, _ = x.shape
    cache[:rows, :, :length] = x
    return cache[:rows, :, :length]


def kept_under_no_grad(layer: Attention, x: Tensor) -> Tensor:
    """What a cache was given without gradients has none; queries have."""
    q, k, v = layer.parts(x)
    with torch.no_grad():
        k, v = kept(layer.keys, k), kept(layer.values, v)
    return layer.end(layer.scores(q, k).softmax(-1), v)


def written_under_no_grad(layer: Attention, x: Tensor) -> Tensor:
    q, k, v = layer.parts(x)
    with torch.no_grad():
        kept(layer.keys, k)
    return layer.end(layer.scores(q, layer.keys[: len(x), :, : x.shape[1]]).softmax(-1), v)


def read_detached(layer: Attention, x: Tensor) -> Tensor:
    q, k, v = layer.parts(x)
    k, v = kept(layer.keys.detach(), k).detach(), kept(layer.values.detach(), v)
    return layer.end(layer.scores(q, k).softmax(-1), v)


def through_a_detached_cache(layer: Attention, x: Tensor) -> Tensor:
    """Gradients pass: both the write and the read are behind the `detach`."""
    q, k, v = layer.parts(x)
    k, v = kept(layer.keys.detach(), k), kept(layer.values.detach(), v)
    return layer.end(layer.scores(q, k).softmax(-1), v)


CACHED = [
    kept_under_no_grad, written_under_no_grad, read_detached, through_a_detached_cache,
]  # fmt: skip
SWITCHED = [under_no_grad, decorated, switched_by_turns, only_values_learn, keys_do_not_learn]


def gradients(model: nn.Module, run: Callable[[Tensor], Tensor]) -> dict[str, Tensor | None]:
    ids = torch.randint(0, VOCAB, (3, 11), generator=torch.Generator().manual_seed(2))
    model.zero_grad()
    logits = run(ids)
    weights = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype)
    (logits * weights.view_as(logits)).sum().backward()
    return {n: p.grad for n, p in model.named_parameters()}


def assert_gradients(
    model: nn.Module, module: nn.Module, run: Callable[[Tensor], Tensor] | None = None
) -> None:
    wanted, found = gradients(model, model), gradients(module, module if run is None else run)
    for name, gradient in wanted.items():
        here = found[name]
        if gradient is None or here is None:  # nothing learns
            assert gradient is None and (here is None or not here.any()), name
        else:
            torch.testing.assert_close(here, gradient, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "step", [*SWITCHED, *CACHED, only_scores_are_detached, tables_need_none, computed_again]
)
def test_gradients_are_the_originals(step: Step) -> None:
    model = Model(step).double()
    assert_gradients(model, fxport.parallelize(model, fxport.ParallelContext(0, 1)))


@pytest.mark.parametrize(
    ("step", "why"),
    [
        (decorated, "under `torch.no_grad`"),
        (only_values_learn, "under `torch.no_grad`"),
        (only_scores_are_detached, "stops the gradient of attention scores"),
        (weights_are_detached, "stops the gradient of attention scores"),
    ],
)
def test_what_is_switched_off_is_served_and_not_trained(
    step: Step, why: str, tmp_path: Path
) -> None:
    port = fxport.port(Model(step).eval())
    assert len(port.serving.attention) >= LAYERS
    assert port.half is not None and port.half.untrainable == port.serving.untrainable
    refuses_training(port, why, tmp_path)


@pytest.mark.parametrize("step", [less_the_detached_maximum, less_the_maximum_of_all])
def test_a_detached_maximum_is_no_reason(step: Step, tmp_path: Path) -> None:
    model = Model(step).double()
    port = fxport.port(model)
    assert len(port.serving.attention) == LAYERS and not port.serving.untrainable
    assert_gradients(model, fxport.load(port.save(tmp_path / "port")).module)


def test_a_table_is_no_reason(tmp_path: Path) -> None:
    model = Model(tables_need_none).double()
    assert_gradients(model, fxport.load(fxport.port(model).save(tmp_path / "port")).module)


class Slower(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x * 1.0

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return gradient * 0.1


def own_backward(layer: Attention, x: Tensor) -> Tensor:
    return layer(Slower.apply(x))


def hooked(layer: Attention, x: Tensor) -> Tensor:
    y = layer(x)
    if y.requires_grad:
        y.register_hook(lambda gradient: gradient * 0.1)
    return y


def asks(layer: Attention, x: Tensor) -> Tensor:
    return layer(x) * (2 if torch.is_grad_enabled() else 1)


def writes_unseen(layer: Attention, x: Tensor) -> Tensor:
    y = layer(x)
    with torch.no_grad():
        y.clamp_(-1, 1)
    return y


def writes_detached(layer: Attention, x: Tensor) -> Tensor:
    y = layer(x)
    y.detach().clamp_(-0.2, 0.2)
    return y


REFUSED = {
    own_backward: "`Slower` has a backward of its own",
    hooked: "Tensor.requires_grad",
    asks: "torch.is_grad_enabled",
    writes_unseen: "changed in place past its gradient",
}


@pytest.mark.parametrize("step", REFUSED)
def test_other_gradients_are_refused_with_the_line(step: Step, tmp_path: Path) -> None:
    model = Model(step)
    with pytest.raises(fxport.PortError) as refused:
        fxport.parallelize(model, fxport.ParallelContext(0, 1))
    reason = refused.value.reasons[0]
    assert reason.code is fxport.ReasonCode.GRADIENT_DIFFERS
    assert REFUSED[step] in reason.message
    assert reason.location is not None and reason.location.file == __file__
    assert reason.location.function == step.__name__
    refuses_training(fxport.port(model.eval()), REFUSED[step], tmp_path)  # values are the same


def refuses_training(port: fxport.Port, why: str, tmp_path: Path) -> None:
    left = [d.reason.message for d in port.report.left() if d.subject.startswith("training")]
    assert any(why in message for message in left)
    loaded = fxport.load(port.save(tmp_path / "port")).module
    logits = loaded(torch.zeros(2, 7, dtype=torch.long))
    with pytest.raises(fxport.FxportError, match="cannot train"):
        F.cross_entropy(logits.flatten(0, 1), torch.ones(14, dtype=torch.long)).backward()


@pytest.mark.parametrize("step", [*SWITCHED, *REFUSED, writes_detached])
def test_a_compiled_model_keeps_them_all(step: Step) -> None:
    torch._dynamo.reset()
    model = Model(step).double()
    assert_gradients(model, model, torch.compile(model, backend="vllm_generic"))


def test_hooks_on_parameters_and_modules_are_not_lost() -> None:
    context = fxport.ParallelContext(0, 1)
    model = Model(lambda layer, x: layer(x))
    fxport.parallelize(model, context)
    hook = model.head.weight.register_hook(lambda gradient: gradient * 0.1)
    with pytest.raises(fxport.PortError, match=r"`head.weight` has a hook"):
        fxport.parallelize(model, context)
    hook.remove()
    model.layers[2].register_full_backward_hook(lambda *_: None)
    with pytest.raises(fxport.PortError, match=r"`layers.2` has a backward hook"):
        fxport.parallelize(model, context)


def test_what_torch_asks_for_itself_is_no_question() -> None:
    """nn.MultiheadAttention looks at gradients to choose its fast path."""
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 31, 0.0, batch_first=True)

    def step(_: Attention, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return layer(x, mask, is_causal=True)

    model = Model(step)
    model.encoder = layer
    fxport.parallelize(model, fxport.ParallelContext(0, 1))


def test_parameters_in_a_closure_are_parameters() -> None:
    """A trace reaches them past the modules, and takes them for constants."""
    model = Model(lambda layer, x: layer(x)).double()
    weight, layers = model.embed.weight, model.layers
    model.step = lambda layer, x: layer(x) + layers[1](x)
    del model.head
    model.head = lambda x: x @ weight.T
    assert_gradients(model, fxport.parallelize(model, fxport.ParallelContext(0, 1)))


def test_a_view_of_a_parameter_that_was_made_before_is_not_trained() -> None:
    model = Model(lambda layer, x: layer(x))
    turned = model.embed.weight.detach().T
    del model.head
    model.head = lambda x: x @ turned
    with pytest.raises(fxport.PortError, match=r"is a view of the parameter `embed.weight`"):
        fxport.parallelize(model, fxport.ParallelContext(0, 1))


def test_the_switches_are_what_they_were() -> None:
    before = (torch.no_grad.__enter__, torch.set_grad_enabled.__init__, torch.is_grad_enabled)
    with pytest.raises(fxport.PortError):
        fxport.parallelize(Model(own_backward), fxport.ParallelContext(0, 1))
    assert before == (
        torch.no_grad.__enter__, torch.set_grad_enabled.__init__, torch.is_grad_enabled
    )  # fmt: skip
    assert torch.autograd.Function.apply.__func__.__module__ == "torch.autograd.function"
