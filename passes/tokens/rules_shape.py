"""Rules of ops that make, copy, cut or regroup values without computing with them."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxport.capture.arguments import arguments, shape_of
from fxport.errors import ReasonCode
from fxport.passes.axes import (
    Axes,
    Axis,
    Refusal,
    Symbols,
    checked,
    has_axis,
    join,
    name,
    reshape,
)
from fxport.passes.constants import is_symbolic
from fxport.passes.tokens.call import Call, free, rule

__all__: list[str] = []

aten = torch.ops.aten


@rule(
    aten.contiguous,
    aten.clone,
    aten.alias,
    aten.detach,
    aten.lift_fresh_copy,
    aten.to,
    aten._to_copy,
    aten.dropout,
    aten.feature_dropout,
    aten.alpha_dropout,
    aten.rrelu,
    aten.conj,
    aten.resolve_conj,
    aten._conj,
    aten.real,
    aten.imag,
)
def _same(call: Call) -> Axes:
    if call.arguments.get("train") or call.arguments.get("training"):
        raise Refusal(ReasonCode.UNSUPPORTED_OP, "dropout is active in eval mode")
    return call.axes[call.node.all_input_nodes[0]]


@rule(aten.type_as, aten.fill)  # with one number
def _first(call: Call) -> Axes:
    return call.of("self")


@rule(
    aten.zeros, aten.ones, aten.full, aten.scalar_tensor, aten.empty,
    aten.new_zeros, aten.new_ones, aten.new_full, aten.new_empty,
)  # fmt: skip
def _uniform(call: Call) -> Axes:
    """The same number everywhere: a size of k*B*T may stand for k slots of each token."""
    return checked(tuple(_slots(s, call.symbols) for s in call.sizes()))


def _slots(size: Any, symbols: Symbols) -> Any:
    times = None if isinstance(size, int) else size / (symbols.batch * symbols.length)
    if times is not None and times.is_Integer and times > 1:
        return (Axis.BATCH, Axis.TOKEN, int(times))
    return symbols.factor(size)


def _factory(call: Call) -> Axes:
    return checked(tuple(call.symbols.factor(s) for s in call.sizes()))


@rule(aten.arange, aten.linspace, aten.eye)
def _range(call: Call) -> Axes:
    """A fixed range; one that grows or moves with the tokens is judged by its values, not here."""
    ends = (call.arguments.get(name) for name in ("start", "end"))
    moves = any(isinstance(end, fx.Node) for end in ends)
    if moves or not all(isinstance(size, int) for size in call.sizes()):
        raise Refusal(ReasonCode.POSITION_UNKNOWN, "a range over the tokens of unknown meaning")
    return _factory(call)


@rule(aten.zeros_like, aten.ones_like, aten.full_like, aten.empty_like)
def _factory_like(call: Call) -> Axes:
    return call.of("self")


# --- views --------------------------------------------------------------------------------------


@rule(
    aten.view,
    aten.reshape,
    aten._unsafe_view,
    aten.flatten,
    aten.unflatten,
    aten.unsqueeze,
    aten.view_as,
    aten.reshape_as,
    aten.ravel,
)
def _regroup(call: Call) -> Axes:
    source = call.axes[call.node.all_input_nodes[0]]
    return reshape(source, call.sizes(), call.symbols)


@rule(aten.squeeze)
def _squeeze(call: Call) -> Axes:
    """By name only: the batch and a single token have size 1 in vLLM, unlike at capture."""
    axes = call.of("self")
    given = call.arguments.get("dim")
    dims = [given] if isinstance(given, int) else given
    if any(has_axis(axes[d]) for d in (range(len(axes)) if dims is None else dims)):
        raise Refusal(
            ReasonCode.UNSUPPORTED_OP,
            "squeeze would drop the batch or token axis when it has size 1",
            "name the dimensions to squeeze",
        )
    return reshape(axes, call.sizes(), call.symbols)


@rule(aten.view_as_real)
def _split_complex(call: Call) -> Axes:
    return (*call.of("self"), (2,))


@rule(aten.view_as_complex)
def _join_complex(call: Call) -> Axes:
    return call.of("self")[:-1]


@rule(aten.transpose, aten.swapaxes)
def _transpose(call: Call) -> Axes:
    axes = list(call.of("self"))
    first, second = (k for k in call.arguments if k != "self")
    a, b = call.dim(first, len(axes)), call.dim(second, len(axes))
    axes[a], axes[b] = axes[b], axes[a]
    return tuple(axes)


@rule(aten.t, aten.numpy_T, aten.mT)
def _matrix_transpose(call: Call) -> Axes:
    axes = call.of("self")
    if call.node.target in (aten.mT.default,):
        return (*axes[:-2], axes[-1], axes[-2])
    return tuple(reversed(axes))


@rule(aten.permute)
def _permute(call: Call) -> Axes:
    axes = call.of("self")
    return tuple(axes[d] for d in call.arguments["dims"])


@rule(aten.diagonal)
def _diagonal(call: Call) -> Axes:
    """Entries with equal places in two dimensions, as the last one."""
    axes = call.of("self")
    ends = {call.dim("dim1", len(axes)), call.dim("dim2", len(axes))}
    for index in ends:
        free(axes[index], "diagonal")
    rest = tuple(dim for index, dim in enumerate(axes) if index not in ends)
    return (*rest, call.symbols.factor(call.sizes()[-1]))


@rule(aten.movedim)
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


@rule(aten.expand, aten.expand_as, aten.broadcast_to)
def _expand(call: Call) -> Axes:
    source = call.of("self")
    sizes = call.sizes()
    padded: Axes = ((),) * (len(sizes) - len(source)) + source
    return checked(tuple(d or call.symbols.factor(s) for d, s in zip(padded, sizes, strict=True)))


@rule(aten.repeat, aten.tile)
def _repeat(call: Call) -> Axes:
    """All tokens, and all of them again: which copy it is comes first."""
    source = call.of("self")
    sizes = call.sizes()
    given = list(call.arguments["repeats" if "repeats" in call.arguments else "dims"])
    padded: Axes = ((),) * (len(sizes) - len(source)) + source
    times = [1] * (len(sizes) - len(given)) + given
    tiled = []
    for dim, size, count in zip(padded, sizes, times, strict=True):
        if not dim or not has_axis(dim):
            tiled.append(call.symbols.factor(size))
        elif isinstance(count, int):
            tiled.append((count, *dim) if count > 1 else dim)
        else:
            raise Refusal(ReasonCode.MIXES_TOKENS, f"{name(dim)} is repeated")
    return checked(tuple(tiled))


@rule(aten.repeat_interleave)
def _repeat_interleave(call: Call) -> Axes:
    if call.node.target is not aten.repeat_interleave.self_int or call.arguments["dim"] is None:
        raise Refusal(ReasonCode.UNSUPPORTED_OP, f"no rule for `{call.node.target}`")
    axes = list(call.of("self"))
    index = call.dim("dim", len(axes))
    copies = call.arguments["repeats"]
    if has_axis(axes[index]) and isinstance(copies, int):  # each token's copies follow each other
        axes[index] = (*axes[index], copies)
    else:
        free(axes[index], "repeat_interleave")
        axes[index] = call.symbols.factor(call.sizes()[index])
    return checked(tuple(axes))


def _resized(call: Call, axes: Axes, index: int, what: str) -> Axes:
    """The same axes with one feature dimension of another size."""
    free(axes[index], what)
    return (*axes[:index], call.symbols.factor(call.sizes()[index]), *axes[index + 1 :])


def _only_row(call: Call, index: int) -> bool:
    """The first row of the token ids where nothing looks at other rows: vLLM has no others."""
    tokens = call.arguments["self"]
    if tokens.op != "placeholder" or call.of("self")[index] != (Axis.BATCH,):
        return False
    users = [user for user in tokens.users if not is_symbolic(user)]
    return all(map(_first_row, users))


def _first_row(node: fx.Node) -> bool:
    """``ids[0]`` or ``ids[:1]``"""
    if node.target not in (aten.select.int, aten.slice.Tensor):
        return False
    given = arguments(node)
    if node.target is aten.select.int:
        return bool(given["dim"] == 0 and given["index"] == 0)
    return given["dim"] == 0 and not given["start"] and given["end"] == 1 and given["step"] == 1


@rule(aten.slice, aten.narrow)
def _slice(call: Call) -> Axes:
    axes = call.of("self")
    index = call.dim("dim", len(axes))
    if _only_row(call, index):
        return ((), *axes[1:])
    before = shape_of(call.arguments["self"])[index]
    if call.sizes()[index] == before and call.arguments.get("step", 1) == 1:
        return axes
    bounds = [call.arguments.get(name) for name in ("start", "end", "length")]
    if any(isinstance(bound, fx.Node) for bound in bounds) and not has_axis(axes[index]):
        raise Refusal(
            ReasonCode.POSITION_UNKNOWN,
            "the rows cut out here depend on the number of tokens",
            "cut from the first row: table[:T]",
        )
    if has_axis(axes[index]):
        raise Refusal(
            ReasonCode.MIXES_TOKENS,
            f"a part of {name(axes[index])} is cut out, so tokens are dropped or shifted",
            "vLLM gives every token its own row: what a token needs of the one before it (a "
            "bigram, a shift) must come through attention",
        )
    return _resized(call, axes, index, "slice")


@rule(aten.select)
def _select(call: Call) -> Axes:
    axes = call.of("self")
    index = call.dim("dim", len(axes))
    if not _only_row(call, index):
        free(axes[index], "select")
    return axes[:index] + axes[index + 1 :]


@rule(aten.split, aten.split_with_sizes, aten.chunk, aten.tensor_split)
def _split(call: Call) -> tuple[Axes, ...]:
    axes = call.of("self")
    index = call.dim("dim", len(axes))
    free(axes[index], "split")
    parts = call.node.meta["val"]
    return tuple(
        (*axes[:index], call.symbols.factor(int(part.shape[index])), *axes[index + 1 :])
        for part in parts
    )


@rule(aten.unbind)
def _unbind(call: Call) -> tuple[Axes, ...]:
    axes = call.of("self")
    index = call.dim("dim", len(axes))
    free(axes[index], "unbind")
    return (axes[:index] + axes[index + 1 :],) * len(call.node.meta["val"])


@rule(aten.cat, aten.concat, aten.concatenate)
def _cat(call: Call) -> Axes:
    operands = [call.axes[t] for t in call.arguments["tensors"]]
    if len(operands) == 1:
        return operands[0]
    index = call.dim("dim", len(operands[0]))
    for operand in operands:
        if has_axis(operand[index]):
            raise Refusal(
                ReasonCode.MIXES_TOKENS,
                f"tensors are concatenated along {name(operand[index])}",
                "vLLM gives every token its own row; prepended or shifted tokens cannot be served",
            )
    outer = join(*((*o[:index], (), *o[index + 1 :]) for o in operands))
    return (*outer[:index], call.symbols.factor(call.sizes()[index]), *outer[index + 1 :])


@rule(aten.stack)
def _stack(call: Call) -> Axes:
    outer = join(*(call.axes[t] for t in call.arguments["tensors"]))
    index = call.dim("dim", len(outer) + 1)
    return (*outer[:index], call.symbols.factor(call.sizes()[index]), *outer[index:])


@rule(aten.flip, aten.roll)
def _along_dims(call: Call) -> Axes:
    axes = call.of("self")
    for d in call.arguments["dims"] or range(len(axes)):
        free(axes[d], str(call.node.target).split(".")[1])
    return axes


@rule(aten.tril, aten.triu)
def _triangle(call: Call) -> Axes:
    axes = call.of("self")
    for dim in axes[-2:]:
        free(dim, "a triangle mask")
    return axes
