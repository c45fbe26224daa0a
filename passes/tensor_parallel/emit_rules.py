"""How each kind of op is written for one rank's part; see `Emission`."""

from __future__ import annotations

import itertools
import operator
import string
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from fxport.capture.arguments import arguments
from fxport.parallel.modules import CopyTo, Gather
from fxport.passes.tensor_parallel.boxes import Box, Undividable, positions
from fxport.passes.tensor_parallel.emission import VOCABULARY, Emission, LocalHeads, Rule
from fxport.passes.tensor_parallel.emit_contraction import emit_contraction
from fxport.passes.tensor_parallel.emit_structure import emit_structure
from fxport.passes.tensor_parallel.factors import unit_shape
from fxport.passes.tensor_parallel.ops import Kind
from fxport.passes.tensor_parallel.vocabulary import bounds

__all__ = ["HEADS", "LOOKUP", "RULES"]

aten = torch.ops.aten

# Facts about emitted nodes, for who replaces them by layers of an engine.
HEADS = "heads"  # of an attention: `LocalHeads`
LOOKUP = "lookup"  # of the reduced look-up: (weight, token ids)
PART = "part"  # of a dropout: (full sizes, positions held) by dimension, None if not divided


def _getitem(e: Emission, node: fx.Node) -> None:
    source, index = node.args
    assert isinstance(source, fx.Node)
    e.env[node] = e.call(operator.getitem, e.env[source], index)
    e.local.add(node)


def _aligned(e: Emission, node: fx.Node, operand: fx.Node, rank: int) -> Box:
    """The box of a broadcast operand: sliced where it spans a divided dimension."""
    shape, out = unit_shape(operand), e.boxes.of_ranks(node, _first(e.labels.atoms[node]))[rank]
    offset = len(out) - len(shape)
    return tuple(None if n == 1 else out[d + offset] for d, n in enumerate(shape))


def _first(atoms: Any) -> Tensor:
    found: Tensor = atoms[0] if isinstance(atoms, tuple) else atoms
    return found


def _pointwise(e: Emission, node: fx.Node) -> None:
    def operand(value: fx.Node) -> fx.Node:
        if not isinstance(value.meta.get("val"), Tensor):
            return e.env[value]
        if value not in e.labels.atoms:
            wanted = e.all_boxes(lambda r: _aligned(e, node, value, r))
            return e.static(value, "sliced", wanted, local=True)
        new, wanted = e.entering(value), e.all_boxes(lambda r: _aligned(e, node, value, r))
        if value in e.local:
            if e.every_box(value) != wanted:
                raise Undividable(node, "operands are divided differently",
                                  [e.labels.atoms[value], e.labels.atoms[node]])  # fmt: skip
            return new
        return e.take_box(new, wanted)

    cache: dict[fx.Node, fx.Node] = {}
    for value in node.all_input_nodes:
        cache[value] = operand(value)
    e.env[node] = e.call(
        node.target, *fx.map_arg(node.args, cache.__getitem__),
        **fx.map_arg(node.kwargs, cache.__getitem__),
    )  # fmt: skip
    e.local.add(node)


def _dropout(e: Emission, node: fx.Node) -> None:
    """Remembers which part of the full tensor it is; `dropout` makes the mask of that part."""
    _pointwise(e, node)
    box = e.box(node)
    full = tuple(e.labels.atoms[node].shape)
    sizes = tuple(n if i is not None else None for n, i in zip(full, box, strict=True))
    new = e.env[node]
    new.meta = {**new.meta, "val": node.meta["val"], PART: (sizes, box)}


def _linear(e: Emission, node: fx.Node) -> None:
    args = arguments(node)
    x, weight, bias = args["input"], args["weight"], args["bias"]
    inside = e.all_boxes(lambda r: (None, e.box(x, r)[-1]))
    if any(box[1] is not None for box in inside):
        if not e.held_once(x):
            raise Undividable(node, "a sum over positions of several ranks", [e.labels.atoms[x]])
        if not e.boxes.complete(e.labels.atoms[node]):
            raise Undividable(node, "divided on both sides", [e.labels.atoms[node]])
        value = e.call(aten.linear.default, e.env[x], e.static(weight, "row", inside, local=True))
        if bias is not None:
            bias = e.static(bias, "replicated", ((None,),) * e.world_size, local=False)
        e.sum_of(node, value, bias)
        return
    rows = e.all_boxes(lambda r: (e.box(node, r)[-1], None))
    new_weight = e.static(weight, "column", rows, local=True)
    new_bias = None
    if bias is not None:
        new_bias = e.static(bias, "column", tuple(b[:1] for b in rows), local=True)
    e.env[node] = e.call(aten.linear.default, e.entering(x), new_weight, new_bias)
    e.local.add(node)


def _cast(e: Emission, node: fx.Node) -> None:
    args = arguments(node)
    new = {k: fx.map_arg(v, e.env.__getitem__) for k, v in args.items() if k != "self"}
    e.env[node] = e.call(node.target, e.env[args["self"]], **new)
    e.local.add(node)


def _embedding(e: Emission, node: fx.Node) -> None:
    """Every token's features of this rank: a table that is read as values of heads, say."""
    args = arguments(node)
    if args["weight"] in e.labels.atoms or args["indices"] in e.local:
        raise Undividable(node, "no table of parameters", [e.labels.atoms[node]])
    columns = e.all_boxes(lambda r: (None, e.box(node, r)[-1]))
    weight = e.static(args.pop("weight"), "column", columns, local=True)
    e.env[node] = e.call(node.target, weight, e.env[args.pop("indices")], **args)
    e.local.add(node)


def _halves(e: Emission, node: fx.Node) -> None:
    """A rank has the same positions of both halves: they are in one class."""
    args = arguments(node)
    e.env[node] = e.call(node.target, **{**args, "self": e.entering(args["self"])})
    e.local.add(node)


def _complex(e: Emission, node: fx.Node) -> None:
    e.env[node] = e.call(node.target, e.entering(arguments(node)["self"]))
    e.local.add(node)


def _mean(e: Emission, node: fx.Node) -> None:
    args = arguments(node)
    x, dim = args["self"], args["dim"][0]
    if not e.divided(x, dim):
        rest = [d for d in range(e.labels.atoms[x].dim()) if d != dim % e.labels.atoms[x].dim()]
        kept = [d for d in range(e.labels.atoms[node].dim()) if not args["keepdim"] or d in rest]
        before = [[box[d] for d in rest] for box in e.every_box(x)]
        if before != [[box[d] for d in kept] for box in e.every_box(node)]:
            raise Undividable(node, "reduces a divided value to a whole one", [e.labels.atoms[x]])
        if node.target is aten.sum.dim_IntList:
            e.env[node] = _own_sum(e, x, **args)
        else:
            e.env[node] = e.call(node.target, **{**args, "self": e.entering(x)})
        e.local.add(node)
        return
    if node.target is aten.linalg_vector_norm.default:
        raise Undividable(node, "the length of a divided vector", [e.labels.atoms[x]])
    size = e.labels.atoms[x].shape[dim]
    total = e.call(
        aten.sum.dim_IntList,
        _counted_once(e, x, dim, e.env[x]),
        [dim],
        args["keepdim"],
        dtype=args["dtype"],
    )
    if node.target is aten.mean.dim:
        total = e.call(aten.div.Tensor, total, size)
    e.env[node] = e.reduce(total)


def _own_sum(
    e: Emission, x: fx.Node, dim: list[int], keepdim: bool, dtype: torch.dtype | None, **_: Any
) -> fx.Node:
    """A sum within this rank; ``sum`` itself stands for summands of several ranks."""
    value = e.entering(x)
    if dtype is not None:
        value = e.call(aten.to.dtype, value, dtype)
    letters = string.ascii_lowercase[: e.labels.atoms[x].dim()]
    dropped = dim[0] % len(letters)
    kept = letters[:dropped] + letters[dropped + 1 :]
    total = e.call(aten.einsum.default, f"{letters}->{kept}", [value])
    return e.call(aten.unsqueeze.default, total, dropped) if keepdim else total


def _counted_once(e: Emission, x: fx.Node, dim: int, value: fx.Node) -> fx.Node:
    """The positions of `dim` that no lower rank holds too, so that a sum counts each once."""
    if e.held_once(x):
        return value
    size = e.labels.atoms[x].shape[dim]
    seen: set[int] = set()
    counted = []
    for box in e.every_box(x):
        held = positions(box[dim], size)
        counted.append(tuple(i for i, p in enumerate(held) if p not in seen))
        seen.update(held)
    return e.take(value, dim, tuple(counted))


def _norm(e: Emission, node: fx.Node) -> None:
    args = arguments(node)
    x, width = args["input"], len(args["normalized_shape"])
    for name in ("weight", "bias"):
        value = args.get(name)
        if value is not None:
            wanted = e.all_boxes(lambda r: e.box(node, r)[-width:])
            args[name] = e.static(value, "sliced", wanted, local=True)
    if not any(e.divided(node, d - width) for d in range(width)):
        args["input"] = e.entering(x)
        e.env[node] = e.call(node.target, **args)
    elif width > 1:
        raise Undividable(node, "a norm over several dimensions", [e.labels.atoms[x]])
    else:
        e.env[node] = _norm_by_moments(e, node, args)
    e.local.add(node)


def _norm_by_moments(e: Emission, node: fx.Node, args: dict[str, Any]) -> fx.Node:
    """Each moment is summed over the ranks; its gradient is, too."""
    x, size = e.env[args["input"]], e.labels.atoms[args["input"]].shape[-1]

    def moment(value: fx.Node) -> fx.Node:
        value = _counted_once(e, args["input"], -1, value)
        part = e.call(aten.div.Tensor, e.call(aten.sum.dim_IntList, value, [-1], True), size)
        return e.collective("copy_to", CopyTo(e.context), e.reduce(part))

    eps = args["eps"]
    if eps is None:
        eps = torch.finfo(args["input"].meta["val"].dtype).eps
    if node.target is aten.layer_norm.default:
        x = e.call(aten.sub.Tensor, x, moment(x))
    variance = moment(e.call(aten.mul.Tensor, x, x))
    scale = e.call(aten.rsqrt.default, e.call(aten.add.Tensor, variance, eps))
    value = e.call(aten.mul.Tensor, x, scale)
    if args.get("weight") is not None:
        value = e.call(aten.mul.Tensor, value, args["weight"])
    if args.get("bias") is not None:
        value = e.call(aten.add.Tensor, value, args["bias"])
    return value


def _attention(e: Emission, node: fx.Node) -> None:
    args = arguments(node)
    q, k, v = args["q"], args["k"], args["v"]
    heads, kv_heads = (e.labels.atoms[n].shape[1] for n in (q, k))

    def query(rank: int) -> tuple[int, ...]:
        return positions(e.box(q, rank)[1], heads)

    def key(rank: int) -> tuple[int, ...]:
        return positions(e.box(k, rank)[1], kv_heads)

    def mapping(rank: int) -> tuple[tuple[int, ...], bool]:
        """(kv head held for each query head, whether that is how the op groups them anyway)."""
        mine, held = query(rank), key(rank)
        wanted = tuple(held.index(h // (heads // kv_heads)) for h in mine)
        group, rest = divmod(len(mine), len(held))
        return wanted, not rest and wanted == tuple(i // group for i in range(len(mine)))

    args.update(q=e.entering(q), k=e.entering(k), v=e.entering(v))
    mappings = [mapping(rank) for rank in range(e.world_size)]
    held = len(key(e.rank))
    groups = {len(query(r)) / len(key(r)) for r in range(e.world_size)}
    # on every rank: backward runs in step, and an engine's cache is the same everywhere
    if len(groups) > 1 or not all(regular for _, regular in mappings):
        held = len(mappings[e.rank][0])
        for name in ("k", "v"):
            args[name] = e.take(args[name], 1, tuple(heads for heads, _ in mappings))
    mine = query(e.rank)
    args["head_offset"] = mine[0]
    for name in ("sinks", "alibi_slopes", "bias"):
        value = args[name]
        if value is None:
            continue
        shape = unit_shape(value)
        dim = len(shape) - 3 if name == "bias" else 0  # [.., H, T, S]

        def box(rank: int, shape: tuple[int, ...] = shape, dim: int = dim) -> Box:
            return tuple(
                e.box(q, rank)[1] if d == dim and n == heads else None for d, n in enumerate(shape)
            )

        args[name] = e.static(value, "sliced", e.all_boxes(box), local=True)
    mapped = {n: fx.map_arg(a, lambda x: e.env.get(x, x)) for n, a in args.items()}
    e.env[node] = e.call(node.target, **mapped)
    e.env[node].meta[HEADS] = LocalHeads(mine, held)
    e.local.add(node)


def _vocabulary(e: Emission, node: fx.Node) -> None:
    """The token embedding looks up its rows and reduces; the head gathers its logits."""
    args = arguments(node)
    size = unit_shape(args["weight"])[0]
    limits = bounds(size, e.world_size)
    parts = tuple((tuple(range(a, b)), None) for a, b in itertools.pairwise(limits))
    weight = e.static(args["weight"], "vocabulary", parts, local=True)
    if node.target is aten.linear.default:
        bias = args["bias"]
        if bias is not None:
            bias = e.static(bias, "vocabulary", tuple(p[:1] for p in parts), local=True)
        value = e.call(aten.linear.default, e.entering(args["input"]), weight, bias)
        sizes = [b - a for a, b in itertools.pairwise(limits)]
        e.env[node] = e.collective("gather", Gather(e.context, sizes), value)
        return
    first, count = limits[e.rank], limits[e.rank + 1] - limits[e.rank]
    rows = e.call(aten.sub.Tensor, e.env[args["indices"]], first)
    outside = e.call(aten.logical_or.default, e.call(aten.lt.Scalar, rows, 0),
                     e.call(aten.ge.Scalar, rows, count))  # fmt: skip
    rows = e.call(aten.masked_fill.Scalar, rows, outside, 0)
    # the row that learns nothing, where it is on this rank
    still = args["padding_idx"] - first
    still = still if args["padding_idx"] >= 0 and 0 <= still < count else -1
    found = e.call(aten.embedding.default, weight, rows, still)
    found = e.call(aten.masked_fill.Scalar, found, e.call(aten.unsqueeze.default, outside, -1), 0)
    e.env[node] = e.reduce(found)
    e.env[node].meta[LOOKUP] = (weight, e.env[args["indices"]])


RULES: Mapping[Any, Rule] = {
    VOCABULARY: _vocabulary,
    operator.getitem: _getitem,
    aten.dropout.default: _dropout,
    Kind.STRUCTURE: emit_structure,
    Kind.POINTWISE: _pointwise,
    Kind.LINEAR: _linear,
    Kind.CONTRACTION: emit_contraction,
    Kind.CAST: _cast,
    Kind.EMBEDDING: _embedding,
    Kind.HALVES: _halves,
    Kind.COMPLEX: _complex,
    Kind.MEAN: _mean,
    Kind.NORM: _norm,
    Kind.ATTENTION: _attention,
}
