"""One rule per class of ATen op: how it carries the axes of its inputs to its output.

A rule sees arguments by schema name and the axes of every tensor input. It returns the axes of
the output, or raises `Refusal` when the op mixes values along the token or the batch axis. An op
without a rule is refused: nothing is assumed of it. Ops that ATen tags as pointwise need no entry.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxport.capture.arguments import arguments, shape_of
from fxport.errors import ReasonCode
from fxport.passes.axes import (
    Axes,
    Axis,
    Dim,
    Refusal,
    Symbols,
    checked,
    has_axis,
    join,
    name,
    reshape,
)

__all__ = ["Call", "has_rule", "propagate"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Call:
    """One node under analysis.

    Attributes:
        node: the call.
        arguments: by schema name, `fx.Node`s included.
        axes: axes of each tensor-valued input node (a tuple of axes for several outputs).
        symbols: B and T.
    """

    node: fx.Node
    arguments: dict[str, Any]
    axes: dict[fx.Node, Any]
    symbols: Symbols

    def of(self, argument: str) -> Axes:
        """Axes of a tensor argument."""
        return self.axes[self.arguments[argument]]

    def all(self) -> list[Axes]:
        return [self.axes[n] for n in self.node.all_input_nodes if n in self.axes]

    def dim(self, argument: str, rank: int) -> int:
        """A dimension argument, counted from the front."""
        return int(self.arguments[argument]) % max(rank, 1)

    def sizes(self) -> tuple[Any, ...]:
        return shape_of(self.node)


Rule = Callable[[Call], Any]
_RULES: dict[Any, Rule] = {}


def _rule(*ops: Any) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        for op in ops:
            for overload in op.overloads():
                _RULES[getattr(op, overload)] = rule
        return rule

    return register


def has_rule(target: Any) -> bool:
    """Whether the analysis knows this op. Saved ports may hold no other."""
    return isinstance(target, torch._ops.OpOverload) and (
        target in _RULES or _is_pointwise(target)
    )


def _is_pointwise(target: torch._ops.OpOverload) -> bool:
    tags = target.tags
    random = torch.Tag.nondeterministic_seeded in tags
    return torch.Tag.pointwise in tags and not target._schema.is_mutable and not random


def propagate(node: fx.Node, axes: dict[fx.Node, Any], symbols: Symbols) -> Any:
    """Axes of the node's output (a tuple of axes where it returns several tensors).

    Raises:
        Refusal: no rule, or the rule refuses.
    """
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or not has_rule(target):
        raise Refusal(ReasonCode.UNSUPPORTED_OP, f"no rule for the operation `{target}`")
    call = Call(node, arguments(node), axes, symbols)
    _no_sizes_as_numbers(call)
    return _RULES.get(target, _pointwise)(call)


# Only these arguments may hold a size that varies with the input.
_SIZE_ARGUMENTS = {"size", "shape", "start", "end", "repeats", "sizes", "implicit"}


def _no_sizes_as_numbers(call: Call) -> None:
    for argument, value in call.arguments.items():
        numbers = isinstance(value, fx.Node) and not isinstance(
            value.meta.get("val"), torch.Tensor | tuple | list
        )
        if numbers and argument not in _SIZE_ARGUMENTS:
            raise Refusal(
                ReasonCode.DEPENDS_ON_LENGTH,
                "the number of tokens (or the batch size) enters the computation as a number",
                "in vLLM the batch is a mix of requests: this number would not be the same",
            )


def _free(dim: Dim, what: str) -> None:
    if has_axis(dim):
        raise Refusal(
            ReasonCode.MIXES_TOKENS,
            f"{what} runs along {name(dim)}, so tokens are mixed outside attention",
            "only attention may look at other tokens",
        )


# --- pointwise and same-shape -------------------------------------------------------------------


def _pointwise(call: Call) -> Axes:
    return join(*call.all()) if call.all() else ()


# Pointwise by their documentation, though ATen does not tag these overloads so.
for _op in (
    aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar, aten.masked_fill.Tensor,
    aten.polar.default, aten.complex.default, aten.hardswish.default, aten.rsub.Tensor,
    aten.floor_divide.default, aten.log_sigmoid.default,
):  # fmt: skip
    _RULES[_op] = _pointwise


@_rule(
    aten.contiguous, aten.clone, aten.alias, aten.detach, aten.lift_fresh_copy, aten.to,
    aten._to_copy, aten.dropout, aten.feature_dropout, aten.conj, aten.resolve_conj, aten._conj,
    aten.real, aten.imag,
)
def _same(call: Call) -> Axes:
    if call.arguments.get("train"):
        raise Refusal(ReasonCode.UNSUPPORTED_OP, "dropout is active in eval mode")
    return call.axes[call.node.all_input_nodes[0]]


@_rule(aten.type_as)
def _first(call: Call) -> Axes:
    return call.of("self")


@_rule(aten.zeros, aten.ones, aten.full, aten.scalar_tensor)
def _factory(call: Call) -> Axes:
    return checked(tuple(call.symbols.factor(s) for s in call.sizes()))


@_rule(aten.arange, aten.linspace, aten.eye)
def _range(call: Call) -> Axes:
    """A fixed range; one that grows with the tokens is judged by its values, not here."""
    if not all(isinstance(size, int) for size in call.sizes()):
        raise Refusal(ReasonCode.POSITION_UNKNOWN, "a range over the tokens of unknown meaning")
    return _factory(call)


@_rule(
    aten.zeros_like, aten.ones_like, aten.full_like, aten.new_zeros, aten.new_ones, aten.new_full,
)
def _factory_like(call: Call) -> Axes:
    return _factory(call)


# --- views --------------------------------------------------------------------------------------


@_rule(
    aten.view, aten.reshape, aten._unsafe_view, aten.flatten, aten.unflatten, aten.squeeze,
    aten.unsqueeze, aten.view_as, aten.reshape_as,
)
def _regroup(call: Call) -> Axes:
    source = call.axes[call.node.all_input_nodes[0]]
    return reshape(source, call.sizes(), call.symbols)


@_rule(aten.view_as_real)
def _split_complex(call: Call) -> Axes:
    return (*call.of("self"), (2,))


@_rule(aten.view_as_complex)
def _join_complex(call: Call) -> Axes:
    return call.of("self")[:-1]


@_rule(aten.transpose, aten.swapaxes)
def _transpose(call: Call) -> Axes:
    axes = list(call.of("self"))
    first, second = (k for k in call.arguments if k != "self")
    a, b = call.dim(first, len(axes)), call.dim(second, len(axes))
    axes[a], axes[b] = axes[b], axes[a]
    return tuple(axes)


@_rule(aten.t, aten.numpy_T, aten.mT)
def _matrix_transpose(call: Call) -> Axes:
    axes = call.of("self")
    if call.node.target in (aten.mT.default,):
        return (*axes[:-2], axes[-1], axes[-2])
    return tuple(reversed(axes))


@_rule(aten.permute)
def _permute(call: Call) -> Axes:
    axes = call.of("self")
    return tuple(axes[d] for d in call.arguments["dims"])


@_rule(aten.movedim)
def _movedim(call: Call) -> Axes:
    axes = call.of("self")
    source, target = call.arguments["source"], call.arguments["destination"]
    sources = [source] if isinstance(source, int) else list(source)
    targets = [target] if isinstance(target, int) else list(target)
    rank = len(axes)
    placed = {t % rank: axes[s % rank] for s, t in zip(sources, targets, strict=True)}
    moved = {s % rank for s in sources}
    rest = iter(d for i, d in enumerate(axes) if i not in moved)
    return tuple(placed[i] if i in placed else next(rest) for i in range(rank))


@_rule(aten.expand, aten.expand_as, aten.broadcast_to)
def _expand(call: Call) -> Axes:
    source = call.of("self")
    sizes = call.sizes()
    padded: Axes = ((),) * (len(sizes) - len(source)) + source
    return checked(tuple(d or call.symbols.factor(s) for d, s in zip(padded, sizes, strict=True)))


@_rule(aten.repeat, aten.tile)
def _repeat(call: Call) -> Axes:
    source = call.of("self")
    sizes = call.sizes()
    padded: Axes = ((),) * (len(sizes) - len(source)) + source
    tiled = []
    for dim, size in zip(padded, sizes, strict=True):
        if not dim:
            tiled.append(call.symbols.factor(size))
        elif not has_axis(dim):
            tiled.append(call.symbols.factor(size))
        elif reshape((dim,), (size,), call.symbols) == (dim,):
            tiled.append(dim)
        else:
            raise Refusal(ReasonCode.MIXES_TOKENS, f"{name(dim)} is repeated")
    return checked(tuple(tiled))


@_rule(aten.repeat_interleave)
def _repeat_interleave(call: Call) -> Axes:
    if call.node.target is not aten.repeat_interleave.self_int or call.arguments["dim"] is None:
        raise Refusal(ReasonCode.UNSUPPORTED_OP, f"no rule for `{call.node.target}`")
    axes = list(call.of("self"))
    index = call.dim("dim", len(axes))
    _free(axes[index], "repeat_interleave")
    axes[index] = call.symbols.factor(call.sizes()[index])
    return tuple(axes)


def _resized(call: Call, axes: Axes, index: int, what: str) -> Axes:
    """The same axes with one feature dimension of another size."""
    _free(axes[index], what)
    return (*axes[:index], call.symbols.factor(call.sizes()[index]), *axes[index + 1 :])


@_rule(aten.slice, aten.narrow)
def _slice(call: Call) -> Axes:
    axes = call.of("self")
    index = call.dim("dim", len(axes))
    before = shape_of(call.arguments["self"])[index]
    if call.sizes()[index] == before and call.arguments.get("step", 1) == 1:
        return axes
    if has_axis(axes[index]):
        raise Refusal(
            ReasonCode.MIXES_TOKENS,
            f"a part of {name(axes[index])} is cut out, so tokens are dropped or shifted",
        )
    return _resized(call, axes, index, "slice")


@_rule(aten.select)
def _select(call: Call) -> Axes:
    axes = call.of("self")
    index = call.dim("dim", len(axes))
    _free(axes[index], "select")
    return axes[:index] + axes[index + 1 :]


@_rule(aten.split, aten.split_with_sizes, aten.chunk, aten.tensor_split)
def _split(call: Call) -> tuple[Axes, ...]:
    axes = call.of("self")
    index = call.dim("dim", len(axes))
    _free(axes[index], "split")
    parts = call.node.meta["val"]
    return tuple(
        (*axes[:index], call.symbols.factor(int(part.shape[index])), *axes[index + 1 :])
        for part in parts
    )


@_rule(aten.unbind)
def _unbind(call: Call) -> tuple[Axes, ...]:
    axes = call.of("self")
    index = call.dim("dim", len(axes))
    _free(axes[index], "unbind")
    return (axes[:index] + axes[index + 1 :],) * len(call.node.meta["val"])


@_rule(aten.cat, aten.concat, aten.concatenate)
def _cat(call: Call) -> Axes:
    operands = [call.axes[t] for t in call.arguments["tensors"]]
    index = call.dim("dim", len(operands[0]))
    for operand in operands:
        if has_axis(operand[index]):
            raise Refusal(
                ReasonCode.MIXES_TOKENS,
                f"tensors are concatenated along {name(operand[index])}",
                "vLLM gives every token its own row; prepended or shifted tokens cannot be served",
            )
    outer = join(*(o[:index] + ((),) + o[index + 1 :] for o in operands))
    return (*outer[:index], call.symbols.factor(call.sizes()[index]), *outer[index + 1 :])


@_rule(aten.stack)
def _stack(call: Call) -> Axes:
    outer = join(*(call.axes[t] for t in call.arguments["tensors"]))
    index = call.dim("dim", len(outer) + 1)
    return (*outer[:index], call.symbols.factor(call.sizes()[index]), *outer[index:])


@_rule(aten.flip, aten.roll)
def _along_dims(call: Call) -> Axes:
    axes = call.of("self")
    for d in call.arguments["dims"] or range(len(axes)):
        _free(axes[d], str(call.node.target).split(".")[1])
    return axes


@_rule(aten.tril, aten.triu)
def _triangle(call: Call) -> Axes:
    axes = call.of("self")
    for dim in axes[-2:]:
        _free(dim, "a triangle mask")
    return axes


# --- reductions and other ops along a dimension ---------------------------------------------------


@_rule(
    aten.mean, aten.sum, aten.amax, aten.amin, aten.var, aten.std, aten.prod, aten.argmax,
    aten.argmin, aten.any, aten.all, aten.logsumexp, aten.linalg_vector_norm, aten.norm,
    aten.max, aten.min, aten.var_mean, aten.median,
)
def _reduce(call: Call) -> Any:
    if "other" in call.arguments:  # max(a, b) of two tensors
        return join(*call.all())
    axes = call.of("self")
    given = call.arguments.get("dim")
    dims = [given] if isinstance(given, int) else list(given or range(len(axes)))
    reduced = {d % max(len(axes), 1) for d in dims}
    operation = str(call.node.target).split(".")[1]
    for d in reduced:
        _free(axes[d], operation)
    keep = call.arguments.get("keepdim", False)
    left = tuple(() if i in reduced else d for i, d in enumerate(axes) if keep or i not in reduced)
    value = call.node.meta["val"]
    return left if isinstance(value, torch.Tensor) else (left,) * len(value)


@_rule(
    aten.softmax, aten._softmax, aten.log_softmax, aten._log_softmax, aten.cumsum, aten.cumprod,
    aten.sort, aten.argsort, aten.topk, aten.kthvalue, aten.logcumsumexp, aten.glu,
)
def _along_dim(call: Call) -> Any:
    axes = call.of("self")
    index = call.dim("dim", len(axes))
    _free(axes[index], str(call.node.target).split(".")[1])
    value = call.node.meta["val"]
    values = [value] if isinstance(value, torch.Tensor) else list(value)
    out = tuple(
        axes
        if v.dim() == 0
        else (*axes[:index], call.symbols.factor(int(v.shape[index])), *axes[index + 1 :])
        for v in values
    )
    return out[0] if isinstance(value, torch.Tensor) else out


@_rule(aten.layer_norm, aten.rms_norm)
def _norm(call: Call) -> Axes:
    axes = call.of("input")
    count = len(call.arguments["normalized_shape"])
    for dim in axes[len(axes) - count :]:
        _free(dim, "normalisation")
    return axes


@_rule(aten.conv1d, aten.conv2d, aten.conv3d)
def _convolution(call: Call) -> Axes:
    axes = call.of("input")
    for dim in axes[1:]:
        _free(dim, "a convolution")
    return (axes[0], *(call.symbols.factor(s) for s in call.sizes()[1:]))


@_rule(aten.batch_norm)
def _batch_norm(call: Call) -> Axes:
    if call.arguments["training"]:
        raise Refusal(ReasonCode.MIXES_TOKENS, "batch norm over the tokens of the batch")
    return call.of("input")


@_rule(aten.pad, aten.constant_pad_nd)
def _pad(call: Call) -> Axes:
    axes = call.of("self")
    sizes, before = call.sizes(), shape_of(call.arguments["self"])
    padding = call.arguments["pad"]
    padded = {len(axes) - 1 - i // 2 for i, width in enumerate(padding) if width != 0}
    for d in padded:
        _free(axes[d], "padding")
    return tuple(
        call.symbols.factor(sizes[d]) if d in padded else axes[d] for d in range(len(before))
    )


# --- products -------------------------------------------------------------------------------------


@_rule(aten.linear)
def _linear(call: Call) -> Axes:
    axes, weight = call.of("input"), call.of("weight")
    _free(axes[-1], "a linear layer")
    for dim in weight:
        _free(dim, "a linear layer's weight")
    return (*axes[:-1], weight[0])


@_rule(aten.matmul, aten.mm, aten.bmm)
def _matmul(call: Call) -> Axes:
    left, right = (call.axes[n] for n in _operands(call, ("self", "other", "mat2")))
    return _product(left, right)


@_rule(aten.addmm, aten.baddbmm)
def _add_product(call: Call) -> Axes:
    first, second = (
        call.axes[n] for n in _operands(call, ("mat1", "mat2", "batch1", "batch2"))
    )
    return join(call.of("self"), _product(first, second))


def _operands(call: Call, names: Sequence[str]) -> list[fx.Node]:
    return [call.arguments[n] for n in names if n in call.arguments]


def _product(left: Axes, right: Axes) -> Axes:
    if len(left) < 2 or len(right) < 2:
        raise Refusal(ReasonCode.UNSUPPORTED_OP, "a product with a one-dimensional tensor")
    _free(left[-1], "a matrix product")
    _free(right[-2], "a matrix product")
    outer = join(left[:-2], right[:-2]) if left[:-2] or right[:-2] else ()
    return checked((*outer, left[-2], right[-1]))


@_rule(aten.outer, aten.ger)
def _outer(call: Call) -> Axes:
    first, second = (call.axes[n] for n in _operands(call, ("self", "vec2")))
    return checked((first[0], second[0]))


@_rule(aten.einsum)
def _einsum(call: Call) -> Axes:
    equation = call.arguments["equation"].replace(" ", "")
    if "." in equation or "->" not in equation:
        raise Refusal(ReasonCode.UNSUPPORTED_OP, f"no rule for the einsum `{equation}`")
    inputs, output = equation.split("->")
    letters: dict[str, Dim] = {}
    operands = [call.axes[t] for t in call.arguments["tensors"]]
    for subscript, axes in zip(inputs.split(","), operands, strict=True):
        for letter, dim in zip(subscript, axes, strict=True):
            letters[letter] = join((letters.get(letter, ()),), (dim,))[0]
    for letter in set(letters) - set(output):
        _free(letters[letter], f"the einsum `{equation}`")
    return checked(tuple(letters[letter] for letter in output))


# --- look-ups -------------------------------------------------------------------------------------


@_rule(aten.embedding)
def _embedding(call: Call) -> Axes:
    weight = call.of("weight")
    for dim in weight:
        _free(dim, "an embedding table")
    return (*call.of("indices"), weight[1])


@_rule(aten.index)
def _index(call: Call) -> Axes:
    axes = call.of("self")
    indices = list(call.arguments["indices"])
    used = [i for i, index in enumerate(indices) if index is not None]
    if used != list(range(used[0], used[-1] + 1)):
        raise Refusal(ReasonCode.UNSUPPORTED_OP, "indexing with separated index tensors")
    picked = [indices[i] for i in used]
    if any(i.meta["val"].dtype in (torch.bool, torch.uint8) for i in picked):
        raise Refusal(ReasonCode.UNSUPPORTED_OP, "indexing with a boolean mask")
    for i in used:
        _free(axes[i], "indexing")
    found = join(*(call.axes[i] for i in picked))
    return checked((*axes[: used[0]], *found, *axes[used[-1] + 1 :]))


@_rule(aten.index_select)
def _index_select(call: Call) -> Axes:
    axes = call.of("self")
    index = call.dim("dim", len(axes))
    _free(axes[index], "index_select")
    return checked((*axes[:index], call.of("index")[0], *axes[index + 1 :]))


@_rule(aten.gather)
def _gather(call: Call) -> Axes:
    axes, index = call.of("self"), call.of("index")
    along = call.dim("dim", len(axes))
    _free(axes[along], "gather")
    for i, (a, b) in enumerate(zip(axes, index, strict=True)):
        if i != along and a != b:
            raise Refusal(ReasonCode.MIXES_TOKENS, "gather from another token")
    return index


@_rule(aten.one_hot)
def _one_hot(call: Call) -> Axes:
    return (*call.of("self"), (int(call.sizes()[-1]),))


# --- attention ------------------------------------------------------------------------------------


def _attention(call: Call) -> tuple[Axes, Axes]:
    """``fxport::attention``: the one op that may look at other tokens, if it is causal."""
    wanted: Dim = (Axis.TOKEN,)
    for operand in ("q", "k", "v"):
        axes = call.of(operand)
        if axes[2] != wanted or axes[0] not in ((Axis.BATCH,), ()) or has_axis(axes[1]):
            words = ", ".join(name(d) for d in axes)
            raise Refusal(
                ReasonCode.MIXES_TOKENS,
                f"attention's {operand} is made of {words}; expected batch, heads, token, head size",
            )
        _free(axes[3], "attention")
    if not call.arguments["causal"]:
        raise Refusal(
            ReasonCode.NOT_CAUSAL,
            "this attention sees later tokens, so the model cannot generate token by token",
            "use a causal mask",
        )
    for operand, what in (("bias", "an additive bias"), ("cu_seqlens", "packed sequences")):
        if call.arguments[operand] is not None:
            raise Refusal(
                ReasonCode.UNSUPPORTED_FEATURE,
                f"attention with {what} cannot be expressed by vLLM's attention layer",
            )
    if call.arguments["q_offset"] != 0 or call.arguments["dropout_p"] != 0:
        raise Refusal(ReasonCode.UNSUPPORTED_FEATURE, "queries do not start at the first key")
    q, v = call.of("q"), call.of("v")
    return (*q[:3], v[3]), q[:3]


def register_attention() -> None:
    """Adds the rule for our own op, which exists once `fxport.ops` is imported."""
    import fxport.ops.attention  # noqa: F401  (registers the op)

    _RULES[torch.ops.fxport.attention.default] = _attention


register_attention()
