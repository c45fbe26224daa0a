"""A grammar of attentions as people write them; `test_attention_fuzz` draws from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hypothesis import strategies
from torch import Tensor

__all__ = ["Recipe", "recipes"]

INF = float("-inf")


@dataclass(frozen=True)
class Recipe:
    """One composition; every field is one decision a writer makes.

    `more`: how many keys there are beyond the queries; `padding`: how a mask from the data is
    applied, "" for none; `loud`: how large the queries are; `second`: another product that is added
    to the scores; `use`: what is done with the weights.
    """

    batch: int
    length: int
    more: int
    kv_heads: int
    groups: int
    size: int
    value_size: int
    repeat: str
    layout: str
    scale: str
    pattern: str
    width: int
    from_end: bool
    spelling: str
    fill: float
    extra: str
    padding: str
    pad_first: bool
    softmax: str
    loud: float
    dynamic: bool
    second: str = "none"
    use: str = "plain"

    @property
    def heads(self) -> int:
        return self.kv_heads * self.groups

    def __call__(self, x: Tensor, y: Tensor, pad: Tensor, extra: Tensor) -> Tensor:
        """x ``[B, T, Hq * D]``, y ``[B, T + more, Hkv * (D + Dv)]``, pad ``[B, T + more]``."""
        q, k, v = self._operands(x, y)
        s = self._all_scores(q, k, pad, extra)
        if self.use != "plain":
            return self._used(s, self._all_scores(q.tanh(), k, pad, extra), k, v)
        if self.extra == "sinks":
            column = extra.view(1, -1, 1, 1).expand(s.size(0), -1, s.size(2), 1)
            return self._output(torch.cat([s, column], -1).softmax(-1)[..., :-1], v)
        if self.softmax == "late":
            e = torch.exp(s - s.amax(-1, keepdim=True))
            return (e @ v) / e.sum(-1, keepdim=True)
        return self._output(self._softmax(s), v)

    def _all_scores(self, q: Tensor, k: Tensor, pad: Tensor, extra: Tensor) -> Tensor:
        s = self._scores(q, k)
        if self.second != "none":
            s = self._with_second(s, q, k)
        if self.extra == "softcap":
            s = 3.0 * torch.tanh(s / 3.0)
        elif self.extra == "temperature":
            s = s * extra.view(-1, 1, 1)
        s = s + self._bias(s, extra) if self.extra in _BIASES else s
        if self.pad_first:
            return self._masked(self._padded(s, pad))
        return self._padded(self._masked(s), pad)

    def _with_second(self, s: Tensor, q: Tensor, k: Tensor) -> Tensor:
        if self.second == "heads":
            return s + q.sin() @ k.sin().mT * 0.5
        if self.second == "shared":  # one key for all heads, of another size
            return torch.einsum("bhtr,bsr->bhts", q[..., :2].cos(), k[:, 0, :, :2]) / 3 + s
        if self.second == "difference":
            return s - (q.sin() @ k.cos().mT - (q.cos() * 0.2) @ k.mT)
        rows, columns = s.shape[-2:]  # learned relative positions
        places = torch.arange(rows + columns - 1, dtype=s.dtype)
        table = torch.sin(places[:, None] * torch.arange(1, q.size(-1) + 1))
        i, j = torch.arange(rows)[:, None], torch.arange(columns)[None]
        distances = (i - j + columns - 1).expand(*s.shape[:2], -1, -1)
        return s + torch.gather(q @ table.mT, -1, distances)

    def _used(self, s: Tensor, other: Tensor, k: Tensor, v: Tensor) -> Tensor:
        w = self._softmax(s)
        gate = k[..., 0].sigmoid().unsqueeze(-2)
        if self.use == "difference":
            return self._output(w - 0.3 * self._softmax(other), v)
        if self.use == "pairs":
            if self.heads % 2:
                return self._output(-0.3 * w, v)
            w = w.unflatten(1, (-1, 2))
            return self._output(w[:, :, 0] - 0.3 * w[:, :, 1], v[:, ::2])
        if self.use == "two values":
            return torch.cat([self._output(w, v), self._output(w, k.tanh())], -1)
        if self.use == "gated":
            return self._output(w * gate, v)
        w = w * gate
        return self._output(w / w.sum(-1, keepdim=True), v)

    # -- operands --------------------------------------------------------------------------------

    def _operands(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, t, _ = x.shape
        k, v = y.split((self.kv_heads * self.size, self.kv_heads * self.value_size), dim=-1)
        q = x.view(b, t, self.heads, self.size).transpose(1, 2)
        k = k.reshape(b, y.size(1), self.kv_heads, self.size).transpose(1, 2)
        v = v.unflatten(-1, (self.kv_heads, self.value_size)).permute(0, 2, 1, 3)
        return q, self._repeated(k), self._repeated(v)

    def _repeated(self, x: Tensor) -> Tensor:
        b, h, t, d = x.shape
        n = self.groups
        if n == 1:
            return x
        if self.repeat == "interleave":
            return x.repeat_interleave(n, dim=1)
        if self.repeat == "tile":
            return x.repeat(1, n, 1, 1)
        if self.repeat == "select":
            return torch.index_select(x, 1, torch.arange(h * n) // n)
        if self.repeat == "index":
            return x[:, torch.arange(h * n) % h]
        if self.repeat == "cat":
            return torch.cat([x[:, i // n : i // n + 1] for i in range(h * n)], dim=1)
        if self.repeat == "stack":
            return torch.stack([x] * n, dim=2).flatten(1, 2)
        return x[:, :, None].expand(b, h, n, t, d).reshape(b, h * n, t, d)

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
            n = k.size(2)
            s = torch.bmm(q.reshape(b * h, t, d), k.reshape(b * h, n, d).mT).view(b, h, t, n)
        elif self.layout == "reversed":
            s = (k @ q.mT).transpose(2, 3)
        elif self.layout == "elementwise":
            s = (q[:, :, :, None] * k[:, :, None]).sum(-1)
        else:
            s = q @ k.transpose(-1, -2)
        if self.scale == "after":
            return s * factor
        if self.scale == "cosines":
            return s / (q.norm(dim=-1)[..., None] * k.norm(dim=-1)[:, :, None])
        return s / self.size**0.5 if self.scale == "divided" else s

    # -- masks -----------------------------------------------------------------------------------

    def allowed(self, rows: int, columns: int) -> Tensor:
        i = torch.arange(rows)[:, None] + (self.more if self.from_end else 0)
        j = torch.arange(columns)[None, :]
        d, w = i - j, self.width
        masks: dict[str, Callable[[], Tensor]] = {
            "causal": lambda: d >= 0,
            "window": lambda: (d >= 0) & (d < w),
            "band": lambda: (d >= -w) & (d <= 2),
            "future": lambda: d <= 0,
            "prefix": lambda: (d >= 0) | (j < w),
            "blocks": lambda: (d >= 0) & (i // w == j // w),
            "hole": lambda: (d >= 0) & ~((d == w) & (i == 5)),
            "late": lambda: (d >= 0) | (i >= 4 * w),
            "late window": lambda: (d >= 0) & ((i < 3 * w) | (d < w)),
            "root": lambda: (d >= 0) | (torch.sqrt(i.double()) > w),
            "dilated": lambda: (d >= 0) & (d % w == 0),
            "diagonals": lambda: torch.ones(rows, columns, dtype=torch.bool).tril(w).triu(-w),
            "full": lambda: d > -(10**6),
        }
        return masks[self.pattern]()

    def _masked(self, s: Tensor) -> Tensor:
        if self.pattern == "none":
            return s
        allowed = self.allowed(s.size(-2), s.size(-1))
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

    def _padded(self, s: Tensor, pad: Tensor) -> Tensor:
        keys = pad[:, None, None, :]
        if self.padding == "fill":
            return s.masked_fill(keys == 0, self.fill)
        if self.padding == "add":
            return s + (1.0 - keys.to(s.dtype)) * -1e9
        if self.padding == "documents":
            rows = pad[:, None, : s.size(2), None]
            return torch.where(rows == keys, s, self.fill)
        return s

    def _bias(self, s: Tensor, extra: Tensor) -> Tensor:
        i, j = torch.arange(s.size(2))[:, None], torch.arange(s.size(3))[None, :]
        per_head = extra.view(-1, 1, 1)
        if self.extra == "learned alibi":
            return per_head * (j - i)
        if self.extra == "alibi":
            return -(2.0 ** -torch.arange(1.0, self.heads + 1)).view(-1, 1, 1) * (i - j)
        if self.extra == "steps":
            return ((i - j) // (4 * self.width)).clamp(min=0) * -0.5
        return per_head * ((j - i) % 3)

    # -- softmax and values ----------------------------------------------------------------------

    def _softmax(self, s: Tensor) -> Tensor:
        if self.softmax == "written":
            e = (s - s.amax(-1, keepdim=True)).exp()
            return e / e.sum(-1, keepdim=True)
        if self.softmax == "unkept":
            e = (s - s.amax(-1)[..., None]).exp()
            return e / e.sum(-1).unsqueeze(-1)
        if self.softmax == "log":
            return F.log_softmax(s, -1).exp()
        return F.softmax(s, dim=3)

    def _output(self, w: Tensor, v: Tensor) -> Tensor:
        if self.layout == "tokens":
            return torch.einsum("bhij,bjhd->bihd", w, v.transpose(1, 2)).flatten(2)
        if self.layout == "folded":
            b, h, t, n = w.shape
            out = torch.bmm(w.reshape(b * h, t, n), v.reshape(b * h, n, -1))
            return out.view(b, h, t, -1).transpose(1, 2).reshape(b, t, -1)
        if self.layout == "einsum":
            return torch.einsum("bhij,bhjd->bihd", w, v).flatten(-2)
        if self.layout == "elementwise":
            return (w[..., None] * v[:, :, None]).sum(-2)
        return (w @ v).transpose(1, 2).contiguous().flatten(2)


_BIASES = ("bias", "alibi", "learned alibi", "steps")


def _one_of(*values: str) -> strategies.SearchStrategy[str]:
    return strategies.sampled_from(values)


recipes = strategies.builds(
    Recipe,
    batch=strategies.integers(1, 4),
    length=strategies.integers(1, 9),
    more=strategies.sampled_from([0, 0, 0, 1, 3]),
    kv_heads=strategies.integers(1, 4),
    groups=strategies.integers(1, 3),
    size=strategies.integers(2, 9),
    value_size=strategies.integers(2, 9),
    repeat=_one_of("interleave", "tile", "expand", "select", "index", "cat", "stack"),
    layout=_one_of("matmul", "einsum", "tokens", "folded", "reversed", "elementwise"),
    scale=_one_of("none", "q", "k", "after", "divided", "cosines"),
    pattern=_one_of(
        "none", "causal", "causal", "window", "band", "future", "prefix", "blocks", "hole", "late",
        "late window", "root", "dilated", "diagonals", "full",
    ),
    width=strategies.integers(1, 5),
    from_end=strategies.booleans(),
    spelling=_one_of("fill", "where", "add", "inplace", "one-minus"),
    fill=strategies.sampled_from([INF, -1e9, -1e5, -1e4, torch.finfo(torch.float32).min]),
    extra=_one_of(
        "none", "none", "softcap", "temperature", "bias", "sinks", "alibi", "learned alibi", "steps"
    ),
    padding=_one_of("", "", "", "fill", "add", "documents"),
    pad_first=strategies.booleans(),
    softmax=_one_of("call", "written", "log", "late", "unkept"),
    loud=strategies.sampled_from([1.0, 1.0, 1.0, 3000.0]),
    dynamic=strategies.sampled_from([False, False, True]),  # takes three times as long
    second=_one_of("none", "none", "none", "heads", "shared", "difference", "relative"),
    use=_one_of(
        "plain", "plain", "plain", "difference", "pairs", "two values", "gated", "renormalised"
    ),
)  # fmt: skip
