"""FlexAttention calls as the formula that they stand for, so that they are found like any other.

Before                                            After
    flex_attention(q, k, v, score_mod,                s = matmul(q, transpose(k, -2, -1)) * scale
                   (.., mask_mod), scale)             s = score_mod(s, b, h, i, j)
                                                      s = where(mask_mod(b, h, i, j), s, -inf)
                                                      out = matmul(_safe_softmax(s, -1), v)

The functions are traced once on grids of indices ``[B, 1, 1, 1], [H, 1, 1], [Tq, 1], [Tk]``, which
says the same as calling them for every entry as long as they are elementwise and look up tables
with all indices. What is refused afterwards is put back as it was: written out it would be slow.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._higher_order_ops.flex_attention import flex_attention as flex_attention_op
from torch.fx.experimental.proxy_tensor import make_fx

from fxport.capture.arguments import shape_of
from fxport.capture.memory import is_mutation
from fxport.errors import ReasonCode
from fxport.passes.attention.emit import Emitter
from fxport.passes.attention.site import Left
from fxport.passes.graph_facts import erase_if_unused, reachable, value_inputs

__all__ = ["FlexCall", "erase_calls", "flex_calls", "is_flex", "put_back", "write_out"]

aten = torch.ops.aten

# Beside operations tagged elementwise: they keep entries apart, or make constants.
_HARMLESS = {
    aten.__and__, aten.__or__, aten.__xor__, aten.floor_divide, aten.true_divide, aten.rsub,
    aten.where, aten.remainder, aten.logical_and, aten.logical_or, aten.logical_not,
    aten.index, aten.to, aten._to_copy, aten.clone, aten.detach, aten.alias, aten.lift_fresh,
    aten.lift_fresh_copy, aten.scalar_tensor, aten.new_ones, aten.new_zeros, aten.new_full,
    aten.ones_like, aten.zeros_like, aten.full_like, aten.full, aten.type_as,
}  # fmt: skip
_NO_BLOCKS = 1 << 30  # block size of the mask that stands for none


@dataclass(frozen=True)
class FlexCall:
    """One call, written out.

    Attributes:
        node: the higher-order op, still in the graph but unused.
        softmax: of the formula.
        out: the formula's result.
        made: all nodes of the formula.
    """

    node: fx.Node
    softmax: fx.Node
    out: fx.Node
    made: tuple[fx.Node, ...]


def is_flex(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is flex_attention_op


def flex_calls(graph: fx.Graph) -> list[fx.Node]:
    return [n for n in graph.nodes if is_flex(n)]


def write_out(gm: fx.GraphModule, node: fx.Node) -> FlexCall:
    """Writes a call out in front of it, and has its users use that.

    Raises:
        Left: it cannot be; the graph is as it was.
    """
    q, k, v, score_mod, block_mask, scale, _, score_tensors, mask_tensors = node.args[:9]
    users = [u for u in node.users if u.users]
    if any(u.target is not operator.getitem or u.args[1] != 0 for u in users) or not users:
        raise Left(ReasonCode.UNSUPPORTED_FEATURE, "the call returns its logsumexp", node)
    operands = [q, k, v]
    if not all(isinstance(x, fx.Node) for x in operands) or not isinstance(scale, float | int):
        raise Left(ReasonCode.UNSUPPORTED_FEATURE, "the scale is no number", node)
    dtypes = {x.meta["val"].dtype for x in (*operands, users[0])}  # type: ignore[union-attr]
    if len(dtypes) != 1:
        raise Left(ReasonCode.UNSUPPORTED_FEATURE, "q, k and v are cast in the call", node)
    assert isinstance(block_mask, tuple | list)
    emitter = Emitter(gm, users[0], [q, k])  # type: ignore[list-item]
    try:
        scores = _product(emitter, q, k, float(scale))
        grid = _grid(emitter, scores)
        scores = _apply(emitter, node, score_mod, [scores, *grid], score_tensors)
        mask = _apply(emitter, node, block_mask[-1], grid, mask_tensors)
        blocked = block_mask[-2] != _NO_BLOCKS or block_mask[-3] != _NO_BLOCKS
        if blocked and not set(grid) & set(reachable([mask], value_inputs)):
            raise Left(
                ReasonCode.MASK_DATA_DEPENDENT,
                "the block mask has no mask function: its blocks are data",
                node,
                "make it by create_block_mask from a function of the positions",
            )
        if mask.meta["val"].dtype != torch.bool:
            raise Left(ReasonCode.UNSUPPORTED_FEATURE, "the mask function gives no bool", node)
        scores = emitter.call(aten.where.ScalarOther, mask, scores, float("-inf"))
        softmax = emitter.call(aten._safe_softmax.default, scores, -1)
        out = _values(emitter, softmax, v, q)
    except Left:
        emitter.undo()
        raise
    for user in users:
        user.replace_all_uses_with(out)
    return FlexCall(node, softmax, out, tuple(emitter.made))


def put_back(gm: fx.GraphModule, call: FlexCall) -> None:
    """The call as it was, in place of its formula."""
    with gm.graph.inserting_after(call.node):
        result = gm.graph.call_function(operator.getitem, (call.node, 0))
    result.meta = dict(call.out.meta)
    call.out.replace_all_uses_with(result)
    erase_if_unused(gm, [call.out])


def erase_calls(gm: fx.GraphModule, calls: Iterable[FlexCall]) -> None:
    """Erases the calls whose formula was found to be an attention, with their functions."""
    for call in calls:
        for user in list(call.node.users):
            gm.graph.erase_node(user)
        functions = [n for n in call.node.all_input_nodes if n.op == "get_attr"]
        gm.graph.erase_node(call.node)
        erase_if_unused(gm, functions)


def _product(emitter: Emitter, q: Any, k: Any, scale: float) -> fx.Node:
    dtype = q.meta["val"].dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if dtype != wide:
        q, k = (emitter.call(aten.to.dtype, x, wide) for x in (q, k))
    k = _repeated(emitter, k, q)
    scores = emitter.call(aten.matmul.default, q, emitter.call(aten.transpose.int, k, -2, -1))
    return emitter.call(aten.mul.Tensor, scores, scale)


def _repeated(emitter: Emitter, x: fx.Node, q: fx.Node) -> fx.Node:
    """K or V with each head repeated for its group of query heads."""
    heads, kv_heads = shape_of(q)[1], shape_of(x)[1]
    if heads == kv_heads:
        return x
    if not isinstance(heads, int) or not isinstance(kv_heads, int):
        raise Left(ReasonCode.UNSUPPORTED_FEATURE, "the number of heads is symbolic", q)
    return emitter.call(aten.repeat_interleave.self_int, x, heads // kv_heads, 1)


def _values(emitter: Emitter, weights: fx.Node, v: Any, q: Any) -> fx.Node:
    dtype = v.meta["val"].dtype
    if weights.meta["val"].dtype != dtype:
        weights = emitter.call(aten.to.dtype, weights, dtype)
    return emitter.call(aten.matmul.default, weights, _repeated(emitter, v, q))


def _grid(emitter: Emitter, scores: fx.Node) -> list[fx.Node]:
    """Indices b, h, i, j that broadcast against the scores."""
    device = scores.meta["val"].device
    grid: list[fx.Node] = []
    for dim, size in enumerate(shape_of(scores)):
        index = emitter.call(aten.arange.default, emitter.size(size), device=device)
        for _ in range(3 - dim):
            index = emitter.call(aten.unsqueeze.default, index, -1)
        grid.append(index)
    return grid


# -- the functions ---------------------------------------------------------------------------------


class _Partial:
    """``table[b]``, of which more indices are to follow."""

    def __init__(self, table: Tensor, indices: tuple[Any, ...]) -> None:
        self.table, self.indices = table, indices

    def take(self, more: Any) -> Tensor | _Partial:
        indices = (*self.indices, *(more if isinstance(more, tuple | list) else (more,)))
        if not all(isinstance(i, Tensor) and not i.is_floating_point() for i in indices):
            raise ValueError("a table is sliced")
        if len(indices) < self.table.dim():
            return _Partial(self.table, indices)
        result: Tensor = self.table[indices]
        return result


class _Elementwise(fx.Interpreter):
    """Runs a function with grids for indices; look-ups in tables wait for their last index."""

    def __init__(self, body: fx.GraphModule, tables: Sequence[Tensor]) -> None:
        super().__init__(body)
        self._tables = tables

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target in (operator.getitem, aten.index.Tensor) and isinstance(
            args[0], Tensor | _Partial
        ):
            table = args[0]
            if isinstance(table, Tensor):
                if not any(table is t for t in self._tables):
                    raise ValueError("something that is no stored table is indexed")
                table = _Partial(table, ())
            return table.take(args[1])
        _check_no_partial(args, kwargs)
        return super().call_function(target, args, kwargs)

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        _check_no_partial(args, kwargs)
        return super().call_method(target, args, kwargs)


def _check_no_partial(args: Any, kwargs: Any) -> None:
    if any(isinstance(a, _Partial) for a in (*args, *kwargs.values())):
        raise ValueError("a whole row of a table is used")


def _apply(emitter: Emitter, node: fx.Node, body: Any, given: list[fx.Node], tables: Any) -> Any:
    """Traces a function and copies it in; returns the node of its result."""
    function = operator.attrgetter(str(body.target))(emitter.gm)
    inputs = [*given, *tables]
    count = len(given)
    if not all(isinstance(x, fx.Node) for x in inputs):
        raise Left(ReasonCode.UNSUPPORTED_FEATURE, "a function captures a number", node)
    if not all(isinstance(x.meta["val"], Tensor) for x in tables):
        raise Left(ReasonCode.UNSUPPORTED_FEATURE, "a function captures a symbolic size", node)

    def run(*values: Any) -> Any:
        return _Elementwise(function, values[count:]).run(*values)

    try:
        with emitter.fake_mode:
            traced = make_fx(run, pre_dispatch=True)(*[x.meta["val"] for x in inputs])
    # The user's function may raise anything on grids in place of single indices.
    except Exception as error:
        raise Left(
            ReasonCode.UNSUPPORTED_FEATURE,
            f"a function of the call is not elementwise: {error}",
            node,
        ) from error
    return _copy(emitter, node, traced, inputs)


def _copy(
    emitter: Emitter, node: fx.Node, traced: fx.GraphModule, inputs: list[fx.Node]
) -> fx.Node:
    env: dict[fx.Node, fx.Node] = {}
    given = iter(inputs)
    for inner in traced.graph.nodes:
        if inner.op == "placeholder":
            env[inner] = next(given)
        elif inner.op == "get_attr":
            env[inner] = emitter.constant("lifted", getattr(traced, str(inner.target)))
        elif inner.op == "output":
            found = inner.args[0]
            if not isinstance(found, fx.Node):
                raise Left(ReasonCode.UNSUPPORTED_FEATURE, "a function returns a number", node)
            return env[found]
        else:
            _check_elementwise(inner, node)
            args, kwargs = fx.node.map_arg((inner.args, inner.kwargs), env.__getitem__)
            env[inner] = emitter.call(inner.target, *args, **kwargs)
    raise AssertionError("a graph without output")


def _check_elementwise(inner: fx.Node, node: fx.Node) -> None:
    target = inner.target
    known = isinstance(target, torch._ops.OpOverload) and (
        torch.Tag.pointwise in target.tags or target.overloadpacket in _HARMLESS
    )
    random = known and torch.Tag.nondeterministic_seeded in target.tags  # type: ignore[union-attr]
    if not known or is_mutation(inner) or random:
        raise Left(
            ReasonCode.UNSUPPORTED_FEATURE,
            f"a function of the call uses `{target}`, which is not elementwise",
            node,
        )
