"""Attention over keys that are no tokens is computed by each token for itself.

Values that are the same at every key:              they are what is returned
    memory = zeros_like(x)                  [B, T, C]
    v = linear(memory, w, b)                .. [B, H, T, D]
    o = attention(q, k, v)                              o = v

A fixed number of keys, S:                          a product, a softmax and a product
    memory = expand(rows [1, S, C], B, ..)  [B, S, C]
    o = attention(q, k, v)                              o = softmax(q @ k^T * scale) @ v

No keys at all: an empty sum
    memory = zeros(B, 0, C)
    o = attention(q, k, v)                              o = 0

A decoder layer without an encoder is fed such a memory. The first holds because the weights of a
query sum to one. The values are proven alike by the rules of token locality: each token is treated
by itself, and nothing that tells tokens apart goes in.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from fxport.capture.arguments import arguments, shape_of
from fxport.capture.location import module_of, user_location
from fxport.passes.attention.emit import Emitter
from fxport.passes.axes import Axes, Axis, Refusal, Symbols
from fxport.passes.constants import is_symbolic
from fxport.passes.tokens.rules import propagate
from fxport.report import Decision, Outcome

__all__ = ["attend_to_fixed_keys"]

aten = torch.ops.aten

_UNIFORM = (
    aten.zeros, aten.ones, aten.full, aten.zeros_like, aten.ones_like, aten.full_like,
    aten.new_zeros, aten.new_ones, aten.new_full,
)  # fmt: skip
_SPREAD = (aten.expand, aten.expand_as, aten.repeat)


def attend_to_fixed_keys(gm: fx.GraphModule, symbols: Symbols) -> tuple[Decision, ...]:
    """Rewrites the graph in place, after `fxport.passes.attention`; one decision for each."""
    target = torch.ops.fxport.attention.default
    calls = [n for n in gm.graph.find_nodes(op="call_function", target=target) if _is_plain(n)]
    if not calls:
        return ()
    alike = _alike(gm, symbols)
    decisions = []
    for call in calls:
        rewritten = _rewritten(gm, call, symbols, alike)
        if rewritten is not None:
            out, detail = rewritten
            _use(call, out)
            line = user_location(call)
            subject = "attention over fixed keys"
            decisions.append(
                Decision("keys", Outcome.REWRITTEN, subject, detail, module_of(call), line)
            )
    if decisions:
        gm.graph.eliminate_dead_code()
        gm.recompile()
    return tuple(decisions)


def _is_plain(call: fx.Node) -> bool:
    """A softmax over all keys alone, of which only the result is used."""
    given = arguments(call)
    tensors = ("bias", "sinks", "alibi_slopes", "cu_seqlens", "seed")
    plain = all(given[name] is None for name in tensors) and not given["causal"]
    whole = given["window_left"] == given["window_right"] == -1
    weights = given["softcap"] == given["dropout_p"] == 0
    picked = [u.target is operator.getitem and u.args[1] == 0 for u in call.users]
    return bool(plain and whole and weights and picked and all(picked))


def _rewritten(
    gm: fx.GraphModule, call: fx.Node, symbols: Symbols, alike: dict[fx.Node, Axes]
) -> tuple[fx.Node, str] | None:
    given = arguments(call)
    q, k, v = given["q"], given["k"], given["v"]
    keys = shape_of(k)[2]
    emitter = Emitter(gm, next(iter(call.users)), [q, v])
    if shape_of(q)[2] != symbols.length:
        return None
    if keys == 0:
        return _empty_sum(emitter, q, v), "no keys: the result is 0"
    if keys == 1 or (keys == symbols.length and _by_token(alike.get(v))):
        return _as_wide(emitter, q, v), "one value at every key: it is the result"
    if not isinstance(keys, int):
        return None
    return _written_out(emitter, q, k, v, given["scale"]), f"{keys} keys, for every token"


def _use(call: fx.Node, out: fx.Node) -> None:
    for user in list(call.users):
        user.replace_all_uses_with(out)
        call.graph.erase_node(user)


# --- what is the same for every token --------------------------------------------------------


def _by_token(axes: Axes | None) -> bool:
    return axes is not None and len(axes) == 4 and axes[2] == (Axis.TOKEN,)


def _alike(gm: fx.GraphModule, symbols: Symbols) -> dict[fx.Node, Any]:
    """The axes of all values whose tokens are proven to be the same."""
    found: dict[fx.Node, Any] = {}
    for node in gm.graph.nodes:
        if node.op != "output" and not is_symbolic(node):
            try:
                axes = _axes(node, found, symbols)
            except Refusal:
                continue
            if axes is not None:
                found[node] = axes
    return found


def _axes(node: fx.Node, found: dict[fx.Node, Any], symbols: Symbols) -> Any:
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor) and not _grows(node, symbols):
        return tuple(symbols.factor(size) for size in shape_of(node))
    packet = getattr(node.target, "overloadpacket", None)
    if packet in _UNIFORM:
        filled = isinstance(arguments(node).get("fill_value", 0), fx.Node)
        return None if filled else tuple(symbols.factor(size) for size in shape_of(node))
    spread = packet in _SPREAD  # another tensor lends its shape
    inputs = node.all_input_nodes[:1] if spread else node.all_input_nodes
    inputs = [n for n in inputs if not is_symbolic(n)]
    if node.op != "call_function" or not all(n in found for n in inputs):
        return None
    if node.target is operator.getitem:
        return found[node.args[0]][node.args[1]]  # type: ignore[index]
    if not spread and not any(_grows(n, symbols) for n in inputs):
        return None  # the first T rows of a table, the numbers of the tokens
    return propagate(node, found, symbols)


def _grows(node: fx.Node, symbols: Symbols) -> bool:
    """Whether a dimension counts tokens."""
    value = node.meta.get("val")
    parts = value if isinstance(value, list | tuple) else [value]
    sizes = [s for v in parts if isinstance(v, torch.Tensor) for s in v.shape]
    return any(
        isinstance(s, torch.SymInt) and symbols.length in s.node.expr.free_symbols for s in sizes
    )


# --- what is computed instead ----------------------------------------------------------------


def _as_wide(emitter: Emitter, q: fx.Node, v: fx.Node) -> fx.Node:
    """The values, for every head and every token."""
    heads, own = shape_of(q)[1], shape_of(v)[1]
    if heads != own:
        v = emitter.call(aten.repeat_interleave.self_int, v, heads // own, 1)
    wide = (*shape_of(q)[:3], shape_of(v)[3])
    return v if shape_of(v) == wide else emitter.call(aten.expand.default, v, emitter.sizes(wide))


def _empty_sum(emitter: Emitter, q: fx.Node, v: fx.Node) -> fx.Node:
    wide = (*shape_of(q)[:3], shape_of(v)[3])
    return emitter.call(aten.new_zeros.default, q, emitter.sizes(wide))


def _written_out(emitter: Emitter, q: fx.Node, k: fx.Node, v: fx.Node, scale: float) -> fx.Node:
    """In float32 between the operands and the result, as the kernels of attention are."""
    heads, own = shape_of(q)[1], shape_of(k)[1]
    if heads != own:
        k, v = (emitter.call(aten.repeat_interleave.self_int, x, heads // own, 1) for x in (k, v))
    fine = torch.promote_types(q.meta["val"].dtype, torch.float32)
    wide_q, wide_k, wide_v = (emitter.call(aten.to.dtype, x, fine) for x in (q, k, v))
    turned = emitter.call(aten.transpose.int, wide_k, 2, 3)
    scores = emitter.call(aten.mul.Tensor, emitter.call(aten.matmul.default, wide_q, turned), scale)
    weights = emitter.call(aten.softmax.int, scores, -1)
    return emitter.call(aten.type_as.default, emitter.call(aten.matmul.default, weights, wide_v), q)
