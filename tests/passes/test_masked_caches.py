"""A cache of fixed size that is written in the call and read whole under a mask."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fxport
from fxport import api
from fxport.backends.torch import PackedModel
from fxport.capture.export import capture
from fxport.errors import PortError
from fxport.passes.attention.rewrite import rewrite_attention
from fxport.passes.axes import Symbols
from fxport.passes.masked_caches import read_by_causal_attention, read_under_masks
from fxport.report import Decision, Outcome

V, C, H, D, LONGEST = 41, 32, 2, 16, 24
aten = torch.ops.aten


def put(cache: Tensor, at: Tensor, new: Tensor) -> Tensor:
    cache[:, :, at] = new
    return cache


def copied(cache: Tensor, at: Tensor, new: Tensor) -> Tensor:
    return cache.index_copy(2, at, new)


def one_later(cache: Tensor, at: Tensor, new: Tensor) -> Tensor:
    return cache.index_copy(2, at + 1, new)


def turned(cache: Tensor, at: Tensor, new: Tensor) -> Tensor:
    return cache.index_copy(2, at.flip(0), new)


def added_up(cache: Tensor, at: Tensor, new: Tensor) -> Tensor:
    written: Tensor = aten.index_put.default(cache, [None, None, at], new, True)
    return written


def as_it_was(cache: Tensor, at: Tensor, new: Tensor) -> Tensor:
    before = cache.clone()
    cache[:, :, at] = new
    return before


def changed_later(cache: Tensor, at: Tensor, new: Tensor) -> Tensor:
    written = cache.index_copy(2, at, new)
    new.mul_(2.0)
    return written


class Cached(nn.Module):
    """One layer in the manner of a generation loop; a batch of one."""

    def __init__(
        self,
        write: Callable[[Tensor, Tensor, Tensor], Tensor] = put,
        seen: int = 0,
        filled: float = 0.0,
        added: bool = False,
        lowest: float = float("-inf"),
    ) -> None:
        super().__init__()
        self.emb = nn.Embedding(V, C)
        self.q, self.kv = nn.Linear(C, C), nn.Linear(C, C)
        self.head = nn.Linear(C, V)
        self.write = write
        mask = torch.ones(LONGEST, LONGEST, dtype=torch.bool).tril(seen)
        if added:
            mask = torch.zeros(LONGEST, LONGEST).masked_fill(~mask, lowest)
        self.register_buffer("mask", mask)
        for name in "kv":
            self.register_buffer(f"{name}s", torch.full((1, 1, LONGEST, D), filled))

    def forward(self, ids: Tensor) -> Tensor:
        batch, length = ids.shape
        at = torch.arange(length)
        x = self.emb(ids) + torch.arange(length)[:, None] * 0.1
        q = self.q(x).view(batch, length, H, D).transpose(1, 2)
        new = self.kv(x).view(batch, length, 2, 1, D).permute(2, 0, 3, 1, 4)
        kv = [self.write(c, at, n) for c, n in zip((self.ks, self.vs), new, strict=True)]
        k, v = (c.repeat_interleave(H, dim=1) for c in kv)
        y = self.attend(q, k, v, self.mask[None, None, at])
        return self.head(x + y.transpose(1, 2).reshape(batch, length, C))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class ByHand(Cached):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        scores = (q * D**-0.5) @ k.transpose(2, 3) + mask
        return scores.softmax(-1) @ v


@pytest.fixture(autouse=True)
def float_only(monkeypatch: pytest.MonkeyPatch) -> None:
    decision = Decision("precision", Outcome.PROVEN, "serving dtype")
    monkeypatch.setattr(api, "_half", lambda *_: (None, decision))


def double(**kinds: object) -> Cached:
    torch.manual_seed(3)
    return Cached(**kinds).double().eval()  # type: ignore[arg-type]


@pytest.mark.parametrize("write", [put, copied])
@pytest.mark.parametrize(
    "kinds", [{}, {"added": True, "filled": 3.0}, {"added": True, "lowest": -2.4e38}]
)
def test_what_was_written_is_read(write: object, kinds: dict[str, object]) -> None:
    check_port(double(write=write, **kinds))


def test_a_cache_is_read_by_an_attention_that_is_written_by_hand() -> None:
    torch.manual_seed(3)
    check_port(ByHand(write=copied, filled=3.0, added=True, lowest=-2.4e38).double().eval())


def check_port(model: Cached) -> None:
    port = fxport.port(model)
    (found,) = [d for d in port.report.decisions if d.pass_name == "caches"]
    assert found.outcome is Outcome.REWRITTEN
    assert port.report.facts["max_position_embeddings"] == LONGEST
    packed = PackedModel(port.serving, port.parameters)
    sequences = [torch.randint(0, V, (n,)) for n in (1, 9, 2, LONGEST)]
    for sequence, logits in zip(sequences, packed(sequences), strict=True):
        with torch.no_grad():
            expected = model(sequence[None])[0]
        torch.testing.assert_close(logits, expected, rtol=0.0, atol=1e-12)


class OneRow(Cached):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids[:1])


class OneRowByHand(ByHand):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids[:1])


def rewritten(by_hand: bool = False, **kinds: object) -> tuple[int, fx.Graph]:
    torch.manual_seed(3)
    captured = capture((OneRowByHand if by_hand else OneRow)(**kinds).eval())  # type: ignore[arg-type]
    gm = captured.graph
    symbols = Symbols(captured.batch, captured.length)
    if not by_hand:
        return len(read_under_masks(gm, symbols)), gm.graph
    assert len(rewrite_attention(gm).sites) == 1
    return len(read_by_causal_attention(gm, symbols)), gm.graph


def test_the_caches_are_gone() -> None:
    count, graph = rewritten()
    assert count == 1
    assert not graph.find_nodes(op="call_function", target=aten.index_put_.default)
    (site,) = graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default)
    query, key = (n.meta["val"].shape for n in site.args[:2])
    assert query == key


@pytest.mark.parametrize(
    "kinds",
    [
        {"seen": 1},  # the next row of the cache is seen, and nobody knows what it holds
        {"filled": float("nan")},  # zero times that is not zero
        {"write": one_later},
        {"write": turned},
        {"write": added_up},
        {"write": as_it_was},
        {"write": changed_later},
        {"added": True, "lowest": -1e6},  # scores may differ by as much
        {"added": True, "seen": -1, "lowest": -2.4e38},  # the first row sees nothing: all alike
        {"by_hand": True, "write": one_later, "added": True},
        {"by_hand": True, "write": copied, "added": True, "filled": float("nan")},
        {"by_hand": True, "write": copied, "added": True, "seen": 1},
    ],
)
def test_what_may_be_left_from_earlier_calls_is_not_dropped(kinds: dict[str, object]) -> None:
    count, graph = rewritten(**kinds)
    writes = {aten.index_put_.default, aten.index_put.default, aten.index_copy.default}
    assert count == 0 and any(n.target in writes for n in graph.nodes)


def test_a_mask_that_shows_more_is_refused() -> None:
    with pytest.raises(PortError):
        fxport.port(double(seen=1))
