"""Token-locality rules of look-ups, and of writing at places: along features, never tokens.

table[ids]    x.gather(-1, chosen)    y[:, places] = x    y.scatter(-1, chosen, x)
"""

from __future__ import annotations

import torch
from torch import fx

from fxport.errors import ReasonCode
from fxport.passes.axes import Axes, Refusal, checked, has_axis, join
from fxport.passes.tokens.call import Call, free, rule

aten = torch.ops.aten


@rule(aten.embedding)
def _embedding(call: Call) -> Axes:
    weight = call.of("weight")
    for dim in weight:
        free(dim, "an embedding table")
    return (*call.of("indices"), weight[1])


@rule(aten.index)
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
        free(axes[i], "indexing")
    found = join(*(call.axes[i] for i in picked))
    return checked((*axes[: used[0]], *found, *axes[used[-1] + 1 :]))


@rule(aten.index_select)
def _index_select(call: Call) -> Axes:
    axes = call.of("self")
    index = call.dim("dim", len(axes))
    free(axes[index], "index_select")
    return checked((*axes[:index], call.of("index")[0], *axes[index + 1 :]))


@rule(aten.gather)
def _gather(call: Call) -> Axes:
    axes, index = call.of("self"), call.of("index")
    along = call.dim("dim", len(axes))
    free(axes[along], "gather")
    for i, (a, b) in enumerate(zip(axes, index, strict=True)):
        if i != along and a != b:
            raise Refusal(ReasonCode.MIXES_TOKENS, "gather from another token")
    return index


@rule(aten.scatter, aten.scatter_add, aten.scatter_reduce)
def _scatter(call: Call) -> Axes:
    """Within each token: only the axis along which values are placed may differ."""
    axes, index = call.of("self"), call.of("index")
    along = call.dim("dim", len(axes))
    free(axes[along], "scatter")
    source = call.arguments.get("src")
    others = [index, call.axes[source]] if isinstance(source, fx.Node) else [index]
    for other in others:
        for i, (a, b) in enumerate(zip(axes, other, strict=True)):
            if (i == along and has_axis(b)) or (i != along and a != b):
                raise Refusal(ReasonCode.MIXES_TOKENS, "scatter to another token")
    return axes


@rule(aten.index_put)
def _index_put(call: Call) -> Axes:
    """``y[:, places] = x``: written at features, into each token what is its own."""
    axes, values = call.of("self"), call.of("values")
    indices = list(call.arguments["indices"])
    (first, *more) = [i for i, index in enumerate(indices) if index is not None]
    index = indices[first]
    if more:
        raise Refusal(ReasonCode.UNSUPPORTED_OP, "writing with several index tensors")
    for dim in call.axes[index]:
        free(dim, "the place to write to")
    rank = len(call.axes[index])
    is_mask = index.meta["val"].dtype in (torch.bool, torch.uint8)
    end = first + (rank if is_mask else 1)
    for i in range(first, end):
        free(axes[i], "writing")
    inner = 1 if is_mask else rank
    behind = len(axes) - end
    # What is written has a size of its own: neither B nor T.
    before, after = _around(values, inner, behind)
    return checked((*join(axes[:first], before), *axes[first:end], *join(axes[end:], after)))


def _around(axes: Axes, inner: int, behind: int) -> tuple[Axes, Axes]:
    """What broadcasts to the dimensions before the written ones, and to the `behind` last."""
    end = max(len(axes) - behind, 0)
    return axes[: max(end - inner, 0)], axes[end:]


@rule(aten.index_copy, aten.index_add, aten.index_fill)
def _index_copy(call: Call) -> Axes:
    axes = call.of("self")
    along = call.dim("dim", len(axes))
    free(axes[along], "writing")
    for dim in call.of("index"):
        free(dim, "the place to write to")
    source = call.arguments.get("source")
    if not isinstance(source, fx.Node):
        return axes  # a number
    given = call.axes[source]
    free(given[along], "writing")
    rest = join((*axes[:along], (), *axes[along + 1 :]), (*given[:along], (), *given[along + 1 :]))
    return checked((*rest[:along], axes[along], *rest[along + 1 :]))


@rule(aten.one_hot)
def _one_hot(call: Call) -> Axes:
    return (*call.of("self"), (int(call.sizes()[-1]),))
