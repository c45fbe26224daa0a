"""Random compositions of scale, mask, layout, grouping and extras, against eager in float64.

Legal compositions must be found and be right; nothing else may be different either.
``FXPORT_FUZZ`` sets the number of cases.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from attention_graphs import Site, compare, rewrite, trace_training
from hypothesis import HealthCheck, Phase, given, settings, strategies
from torch import Tensor

INF = float("-inf")
CASES = int(os.environ.get("FXPORT_FUZZ", "40"))


@dataclass(frozen=True)
class Recipe:
    """One composition; every field is one decision a writer makes."""

    batch: int
    length: int
    kv_heads: int
    groups: int
    size: int
    value_size: int
    repeat: str
    layout: str
    scale: str
    pattern: str
    width: int
    spelling: str
    fill: float
    extra: str
    softmax: str
    dynamic: bool

    def __call__(self, x: Tensor, y: Tensor, extra: Tensor) -> Tensor:
        q, k, v = self._operands(x, y)
        s = self._scores(q, k)
        if self.extra == "softcap":
            s = 3.0 * torch.tanh(s / 3.0)
        elif self.extra == "temperature":
            s = s * extra.view(-1, 1, 1)
        elif self.extra == "bias":
            t = torch.arange(q.size(2))
            s = s + extra.view(-1, 1, 1) * ((t[None] - t[:, None]) % 3)
        s = self._masked(s)
        if self.extra == "sinks":
            column = extra.view(1, -1, 1, 1).expand(s.size(0), -1, s.size(2), 1)
            w = torch.cat([s, column], -1).softmax(-1)[..., :-1]
        else:
            w = self._softmax(s)
        return self._output(w, v)

    def _operands(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads = self.kv_heads * self.groups
        b, t, _ = x.shape
        qk = heads * self.size, self.kv_heads * self.size, self.kv_heads * self.value_size
        q, k, v = torch.cat([x, y], -1).split(qk, dim=-1)
        q = q.view(b, t, heads, self.size).transpose(1, 2)
        k = k.reshape(b, t, self.kv_heads, self.size).transpose(1, 2)
        v = v.unflatten(-1, (self.kv_heads, self.value_size)).permute(0, 2, 1, 3)
        return q, self._repeated(k), self._repeated(v)

    def _repeated(self, x: Tensor) -> Tensor:
        b, h, t, d = x.shape
        if self.groups == 1:
            return x
        if self.repeat == "interleave":
            return x.repeat_interleave(self.groups, dim=1)
        if self.repeat == "tile":
            return x.repeat(1, self.groups, 1, 1)
        return x[:, :, None].expand(b, h, self.groups, t, d).reshape(b, h * self.groups, t, d)

    def _scores(self, q: Tensor, k: Tensor) -> Tensor:
        factor = self.size**-0.5
        if self.scale == "q":
            q = q * factor
        elif self.scale == "k":
            k = k / self.size**0.5
        b, h, t, d = q.shape
        if self.layout == "einsum":
            s = torch.einsum("bhid,bhjd->bhij", q, k)
        elif self.layout == "tokens":
            s = torch.einsum("bihd,bjhd->bhij", q.transpose(1, 2), k.transpose(1, 2))
        elif self.layout == "folded":
            s = torch.bmm(q.reshape(b * h, t, d), k.reshape(b * h, t, d).mT).view(b, h, t, t)
        elif self.layout == "reversed":
            s = (k @ q.mT).transpose(2, 3)
        else:
            s = q @ k.transpose(-1, -2)
        if self.scale == "after":
            return s * factor
        return s / self.size**0.5 if self.scale == "divided" else s

    def _allowed(self, t: int) -> Tensor:
        i = torch.arange(t)
        d = i[:, None] - i[None, :]
        return {
            "causal": d >= 0,
            "window": (d >= 0) & (d < self.width),
            "band": (d >= -self.width) & (d <= 2),
            "future": d <= 0,
            "prefix": (d >= 0) | (i[None, :] < self.width),
            "blocks": (d >= 0) & (i[:, None] // self.width == i[None, :] // self.width),
            "hole": (d >= 0) & ~((d == self.width) & (i[:, None] == 5)),
            "full": d > -(10**6),
        }[self.pattern]

    def _masked(self, s: Tensor) -> Tensor:
        if self.pattern == "none":
            return s
        allowed = self._allowed(s.size(-1))
        if self.spelling == "fill":
            return s.masked_fill(~allowed, self.fill)
        if self.spelling == "where":
            return torch.where(allowed, s, self.fill)
        if self.spelling == "add":
            return s + torch.zeros_like(s[0, 0]).masked_fill(~allowed, self.fill)
        if self.spelling == "inplace":
            s = s + 0.0
            s.masked_fill_(~allowed[None, None], self.fill)
            return s
        return s + (1.0 - allowed.to(s.dtype)) * max(self.fill, torch.finfo(s.dtype).min)

    def _softmax(self, s: Tensor) -> Tensor:
        if self.softmax == "written":
            e = (s - s.amax(-1, keepdim=True)).exp()
            return e / e.sum(-1, keepdim=True)
        if self.softmax == "log":
            return F.log_softmax(s, -1).exp()
        return F.softmax(s, dim=3)

    def _output(self, w: Tensor, v: Tensor) -> Tensor:
        if self.layout == "tokens":
            return torch.einsum("bhij,bjhd->bihd", w, v.transpose(1, 2)).flatten(2)
        if self.layout == "folded":
            b, h, t, _ = w.shape
            out = torch.bmm(w.reshape(b * h, t, t), v.reshape(b * h, t, -1))
            return out.view(b, h, t, -1).transpose(1, 2).reshape(b, t, -1)
        if self.layout == "einsum":
            return torch.einsum("bhij,bhjd->bihd", w, v).flatten(-2)
        return (w @ v).transpose(1, 2).contiguous().flatten(2)


def one_of(*values: str) -> strategies.SearchStrategy[str]:
    return strategies.sampled_from(values)


recipes = strategies.builds(
    Recipe,
    batch=strategies.integers(1, 4),
    length=strategies.integers(2, 9),
    kv_heads=strategies.integers(1, 4),
    groups=strategies.integers(1, 3),
    size=strategies.integers(2, 9),
    value_size=strategies.integers(2, 9),
    repeat=one_of("interleave", "tile", "expand"),
    layout=one_of("matmul", "einsum", "tokens", "folded", "reversed"),
    scale=one_of("none", "q", "k", "after", "divided"),
    pattern=one_of(
        "none", "causal", "window", "band", "future", "prefix", "blocks", "hole", "full"
    ),
    width=strategies.integers(1, 4),
    spelling=one_of("fill", "where", "add", "inplace", "one-minus"),
    fill=strategies.sampled_from([INF, -1e9, -1e4, torch.finfo(torch.float64).min]),
    extra=one_of("none", "softcap", "temperature", "bias", "sinks"),
    softmax=one_of("call", "written", "log"),
    dynamic=strategies.booleans(),
)


def _inputs(recipe: Recipe, batch: int, length: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(batch * 31 + length)
    heads = recipe.kv_heads * recipe.groups

    def random(width: int) -> Tensor:
        return torch.randn(batch, length, width, generator=generator, dtype=torch.float64)

    both = recipe.size + recipe.value_size
    return [random(heads * recipe.size), random(recipe.kv_heads * both)]


@settings(
    max_examples=CASES,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],  # shrinking would take minutes of compilation
)
@given(recipe=recipes)
def test_random_attention(recipe: Recipe) -> None:
    check(recipe)


def check(recipe: Recipe) -> None:
    heads = recipe.kv_heads * recipe.groups
    function: Callable[..., Tensor] = lambda x, y, extra: recipe(x, y, extra)  # noqa: E731
    module = Site(function, [torch.linspace(0.5, 1.5, heads, dtype=torch.float64)])
    data = _inputs(recipe, recipe.batch, recipe.length)
    dynamic = {0: (0, 1), 1: (0, 1)} if recipe.dynamic and recipe.batch > 1 else {}
    found = rewrite(trace_training(module, data, dynamic))
    assert found.count == 1, found.result.decisions
    compare(module, found.graph, data, 1e-8)
    if dynamic:
        for batch, length in ((recipe.batch + 1, recipe.length + 3), (2, 13)):
            compare(module, found.graph, _inputs(recipe, batch, length), 1e-8)
