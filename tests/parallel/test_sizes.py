"""A divided model takes the lengths for which its graph was shown to hold, and no others."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxport.errors import FxportError, PortError
from fxport.parallel.api import parallelize_all
from fxport.parallel.context import ParallelContext
from fxport.passes.tensor_parallel.build import divide, prepare, rank_module
from fxport.passes.tensor_parallel.checker import check
from fxport.passes.tensor_parallel.numbers import check_numbers
from fxport.passes.tensor_parallel.origins import check_origins
from tests.parallel.simulation import randomised

_VOCAB, _HEADS, _SIZE = 29, 3, 4
_WIDTH = _HEADS * _SIZE


class _Model(nn.Module):
    """Four layers of attention; `around` may treat a layer otherwise."""

    def __init__(self, around: Callable[[_Model, int, Tensor], Tensor]) -> None:
        super().__init__()
        self.embed = nn.Embedding(_VOCAB, _WIDTH)
        self.qkv = nn.ModuleList(nn.Linear(_WIDTH, 3 * _WIDTH) for _ in range(4))
        self.out = nn.ModuleList(nn.Linear(_WIDTH, _WIDTH) for _ in range(4))
        self.head = nn.Linear(_WIDTH, _VOCAB)
        self.around = around

    def attention(self, layer: int, x: Tensor, masked: bool = True) -> Tensor:
        b, t, _ = x.shape
        heads = self.qkv[layer](x).view(b, t, 3, _HEADS, _SIZE).permute(2, 0, 3, 1, 4)
        q, k, v = heads.unbind(0)
        scores = q @ k.transpose(-2, -1) / _SIZE**0.5
        if masked:
            scores = scores + torch.full((t, t), -torch.inf, dtype=x.dtype).triu(1)
        y = F.softmax(scores, -1) @ v
        return x + self.out[layer](y.transpose(1, 2).reshape(b, t, _WIDTH))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in range(4):
            x = self.around(self, layer, x)
        return self.head(x)


def _plain(model: _Model, layer: int, x: Tensor) -> Tensor:
    return model.attention(layer, x)


def _mask_for_more(model: _Model, layer: int, x: Tensor) -> Tensor:
    return model.attention(layer, x, masked=x.shape[1] > 1)


def _another_beyond(model: _Model, layer: int, x: Tensor) -> Tensor:
    if x.shape[1] > 50:
        return x - model.attention(layer, x)
    return model.attention(layer, x)


def _refused_beyond(model: _Model, layer: int, x: Tensor) -> Tensor:
    if int(x.shape[1]) > 50:
        raise ValueError("too long")
    return model.attention(layer, x)


def _divided(around: Callable[..., Tensor]) -> tuple[_Model, list[fx.GraphModule], ParallelContext]:
    torch.manual_seed(0)
    model = _Model(around).double().eval()
    contexts = ParallelContext.simulated(2)
    return model, parallelize_all(model, contexts), contexts[0]


def _require_equal(
    model: _Model, modules: list[fx.GraphModule], context: ParallelContext, length: int
) -> None:
    ids = torch.randint(_VOCAB, (3, length))
    model.zero_grad()
    want = model(ids)
    want.square().sum().backward()

    def step(rank: int) -> Tensor:
        modules[rank].zero_grad()
        found = modules[rank](ids)
        found.square().sum().backward()
        return found

    for found in context.group.run(step):
        torch.testing.assert_close(found, want)
    norms = [m.get_parameter("embed.weight").grad for m in modules]
    full = model.embed.weight.grad
    assert full is not None
    for part, rows in zip(norms, modules[0].plan.shard("embed.weight").indices, strict=True):
        index = slice(None) if rows[0] is None else list(rows[0])
        torch.testing.assert_close(part, full[index])


@pytest.mark.parametrize("around", [_plain, _mask_for_more])
def test_one_token_is_taken_where_it_is_computed_alike(around: Callable[..., Tensor]) -> None:
    model, modules, context = _divided(around)
    for length in (1, 2, 7, 60):
        _require_equal(model, modules, context, length)
    assert not hasattr(modules[0], "fxport_sizes")


def test_beyond_what_was_captured_it_raises() -> None:
    model, modules, context = _divided(_refused_beyond)
    _require_equal(model, modules, context, 1)
    _require_equal(model, modules, context, 50)
    with pytest.raises(FxportError, match=r"51 tokens: .*at most 50"):
        modules[0](torch.zeros(2, 51, dtype=torch.long))


def test_another_path_beyond_a_length_is_refused_at_its_line() -> None:
    with pytest.raises(PortError, match="for 53, as one with a path for some lengths") as refused:
        _divided(_another_beyond)
    (reason,) = refused.value.reasons
    assert reason.location is not None and reason.location.file == __file__
    assert reason.location.line == _another_beyond.__code__.co_firstlineno + 2


class _FewKeys(nn.Module):
    """Rotary multi-query layers of 8, 6, 5 and 4 heads: the ranks take parts of whole keys."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(_VOCAB, _WIDTH)
        self.q = nn.ModuleList(nn.Linear(_WIDTH, heads * _SIZE) for heads in (8, 6, 5, 4))
        self.kv = nn.ModuleList(
            nn.Linear(_WIDTH, 2 * kv_heads * _SIZE) for kv_heads in (1, 2, 1, 4)
        )
        self.out = nn.ModuleList(nn.Linear(heads * _SIZE, _WIDTH) for heads in (8, 6, 5, 4))
        self.head = nn.Linear(_WIDTH, _VOCAB)

    def rotated(self, x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[-2])[:, None] * torch.tensor([1.0, 0.1])
        cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat([-b, a], -1) * sin

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for q, kv, out in zip(self.q, self.kv, self.out, strict=True):
            both = (y.unflatten(-1, (-1, _SIZE)).transpose(1, 2) for y in kv(x).chunk(2, -1))
            queries = q(x).unflatten(-1, (-1, _SIZE)).transpose(1, 2)
            k, v = both
            y = F.scaled_dot_product_attention(
                self.rotated(queries), self.rotated(k), v, is_causal=True, enable_gqa=True
            )
            x = x + out(y.transpose(1, 2).flatten(2))
        return self.head(x)


def test_the_checks_fix_no_size() -> None:
    """Every rank is divided from the same graph: its sizes are as symbolic as before."""
    prepared = prepare(randomised(_FewKeys()), own_modes=True)
    graph = prepared.graph.graph

    def sizes() -> dict[str, str]:
        return {n.name: str(getattr(n.meta.get("val"), "shape", "")) for n in graph.nodes}

    before = sizes()
    for context in ParallelContext.simulated(3):
        divided = divide(prepared, context)
        module = rank_module(divided)
        assert not check(module, divided.plan, context.rank)
        assert not check_origins(graph, module, divided.plan, context.rank)
        assert not check_numbers(graph, module)
        assert sizes() == before
