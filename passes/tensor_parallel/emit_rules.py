"""How each kind of op is written for one rank's part; see `Emission`."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxport.capture.arguments import arguments
from fxport.parallel.modules import CopyTo, Gather
from fxport.passes.tensor_parallel.boxes import Box, Undividable, select
from fxport.passes.tensor_parallel.emission import VOCABULARY, Emission, LocalHeads, Rule
from fxport.passes.tensor_parallel.factors import unit_shape, unit_value
from fxport.passes.tensor_parallel.ops import Kind
from fxport.passes.tensor_parallel.vocabulary import bounds

__all__ = ["HEADS", "LOOKUP", "RULES"]

aten = torch.ops.aten

# Facts about emitted nodes, for who replaces them by layers of an engine.
HEADS = "heads"  # of an attention: `LocalHeads`
LOOKUP = "lookup"  # of the reduced look-up: (weight, token ids)


def _getitem(e: Emission, node: fx.Node) -> None:
    source, index = node.args
    assert isinstance(source, fx.Node)
    e.env[node] = e.call(operator.getitem, e.env[source], index)
    e.local.add(node)


def _sized(e: Emission, node: fx.Node, sizes: Any, local: tuple[int, ...]) -> list[Any]:
    result: list[Any] = []
    for size, here, before in zip(sizes, local, unit_shape(node), strict=True):
        if isinstance(size, fx.Node):
            if here != before:
                raise Undividable(node, "a divided size is an expression", [e.labels.atoms[node]])
            result.append(e.env[size])
        else:
            result.append(size if size == -1 else here)
    return result


def _shape(box: Box, full: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n if i is None else len(i) for i, n in zip(box, full, strict=True))


def _structure(e: Emission, node: fx.Node) -> None:
    """The same op with this rank's sizes; checked on the labels, position by position."""
    atoms = e.labels.atoms[node]
    target, args = node.target, arguments(node)
    inputs = [i for i in node.all_input_nodes if i in e.labels.atoms]
    if target in (aten.view.default, aten.reshape.default, aten.expand.default):
        key = "shape" if "shape" in args else "size"
        local = _shape(e.box(node), tuple(atoms.shape))
        args[key] = _sized(e, node, args[key], local)
        if target is aten.view.default:
            target = aten.reshape.default
            args = {"self": args["self"], "shape": args[key]}
    elif target is aten.view_as.default:
        target, args = aten.reshape.default, _like(e, node, args)
        inputs = [args["self"]]
    elif target is aten.unflatten.int:
        local = _shape(e.box(node), tuple(atoms.shape))
        dim = args["dim"] % len(e.labels.atoms[args["self"]].shape)
        args["sizes"] = list(local[dim : dim + len(args["sizes"])])
    elif target in (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default):
        dim = args["dim"]
        sizes = []
        for part in atoms:
            index = e.boxes.box(node, part, e.rank)[dim]
            sizes.append(part.shape[dim] if index is None else len(index))
        target, args = aten.split_with_sizes.default, {
            "self": args["self"], "split_sizes": sizes, "dim": dim,
        }  # fmt: skip
    elif target is aten.slice.Tensor:
        args = _sliced(e, node, args)
    elif target is aten.cat.default:
        args["tensors"] = _nonempty(e, args["tensors"])
    values = {i: select(e.labels.atoms[i], e.box(i)) for i in inputs}
    _check_positions(e, node, target, args, values)
    new = {k: fx.map_arg(v, lambda n: _operand(e, n)) for k, v in args.items()}
    e.env[node] = e.call(target, **new)
    e.local.add(node)


def _like(e: Emission, node: fx.Node, args: dict[str, Any]) -> dict[str, Any]:
    """``x.view_as(y)``: y may be whole where x is divided, so only its other sizes are read."""
    box, other = e.box(node), args["other"]
    theirs = e.box(other) if other in e.labels.atoms else (None,) * len(box)
    shape: list[Any] = []
    for dim, (mine, their) in enumerate(zip(box, theirs, strict=True)):
        if mine is None and their is not None:
            raise Undividable(node, "a size of a divided value", [e.labels.atoms[other]])
        if mine is not None:
            shape.append(len(mine))
        else:
            shape.append(e.call(aten.sym_size.int, e.env[other], dim))
            shape[-1].meta["val"] = unit_shape(other)[dim]
    return {"self": args["self"], "shape": shape}


def _nonempty(e: Emission, parts: Sequence[fx.Node]) -> list[fx.Node]:
    """Without ``x[..., 64:]`` of 64 features: it has no position that says who holds its heads."""
    kept = [p for p in parts if p not in e.labels.atoms or e.labels.atoms[p].numel()]
    same = len({p.meta["val"].dtype for p in parts}) == 1
    return kept if kept and same else list(parts)


def _operand(e: Emission, value: fx.Node) -> fx.Node:
    if value in e.labels.atoms:
        return e.entering(value)
    return e.env.get(value, value)


def _sliced(e: Emission, node: fx.Node, args: dict[str, Any]) -> dict[str, Any]:
    before = e.box(args["self"])
    index = before[args["dim"]]
    if index is None:
        return args
    size = e.labels.atoms[args["self"]].shape[args["dim"]]
    chosen = set(
        range(size)[slice(unit_value(args["start"]), unit_value(args["end"]), args["step"])]
    )
    here = [i for i, position in enumerate(index) if position in chosen]
    if args["step"] != 1 or not here or here != list(range(here[0], here[0] + len(here))):
        raise Undividable(node, "a slice takes scattered positions", [e.labels.atoms[args["self"]]])
    return {**args, "start": here[0], "end": here[0] + len(here)}


def _check_positions(
    e: Emission, node: fx.Node, target: Any, args: dict[str, Any], values: dict[fx.Node, Tensor]
) -> None:
    atoms = e.labels.atoms[node]
    known: dict[fx.Node, Any] = dict(values)

    def number(value: fx.Node) -> Any:
        if value in known:
            return known[value]
        return unit_value(next((o for o, n in e.env.items() if n is value), value))

    where = [a for i in values for a in (e.labels.atoms[i],)]
    try:
        got = target(**{k: fx.map_arg(v, number) for k, v in args.items()})
    except (RuntimeError, IndexError) as error:
        raise Undividable(node, f"not possible on a part: {error}", where) from error
    pairs = zip(got, atoms, strict=True) if isinstance(atoms, tuple) else [(got, atoms)]
    for found, wanted in pairs:
        if not wanted.numel() and not found.numel():
            continue
        if not torch.equal(found, select(wanted, e.boxes.box(node, wanted, e.rank))):
            raise Undividable(node, "a part of the input gives another part of the output", where)


def _aligned(e: Emission, node: fx.Node, operand: fx.Node, rank: int) -> Box:
    """The box of a broadcast operand: sliced where it spans a divided dimension."""
    shape, out = unit_shape(operand), e.boxes.box(node, _first(e.labels.atoms[node]), rank)
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
        new, wanted_box = e.entering(value), _aligned(e, node, value, e.rank)
        if value in e.local:
            if e.box(value) != wanted_box:
                raise Undividable(node, "operands are divided differently",
                                  [e.labels.atoms[value], e.labels.atoms[node]])  # fmt: skip
            return new
        for dim, index in enumerate(wanted_box):
            if index is not None:
                new = e.take(new, dim, index)
        return new

    cache: dict[fx.Node, fx.Node] = {}
    for value in node.all_input_nodes:
        cache[value] = operand(value)
    e.env[node] = e.call(
        node.target, *fx.map_arg(node.args, cache.__getitem__),
        **fx.map_arg(node.kwargs, cache.__getitem__),
    )  # fmt: skip
    e.local.add(node)


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
        value = e.reduce(value)
        if bias is not None:
            value = e.call(aten.add.Tensor, value, e.static(bias, "replicated",
                           ((None,),) * e.world_size, local=False))  # fmt: skip
        e.env[node] = value
        return
    rows = e.all_boxes(lambda r: (e.box(node, r)[-1], None))
    new_weight = e.static(weight, "column", rows, local=True)
    new_bias = None
    if bias is not None:
        new_bias = e.static(bias, "column", tuple(b[:1] for b in rows), local=True)
    e.env[node] = e.call(aten.linear.default, e.entering(x), new_weight, new_bias)
    e.local.add(node)


def _complex(e: Emission, node: fx.Node) -> None:
    e.env[node] = e.call(node.target, e.entering(arguments(node)["self"]))
    e.local.add(node)


def _mean(e: Emission, node: fx.Node) -> None:
    args = arguments(node)
    x, dim = args["self"], args["dim"][0]
    if not e.divided(x, dim):
        e.env[node] = e.call(aten.mean.dim, e.entering(x), [dim], args["keepdim"],
                             dtype=args["dtype"])  # fmt: skip
        e.local.add(node)
        return
    size = e.labels.atoms[x].shape[dim]
    total = e.call(
        aten.sum.dim_IntList,
        _counted_once(e, x, dim, e.env[x]),
        [dim],
        args["keepdim"],
        dtype=args["dtype"],
    )
    e.env[node] = e.reduce(e.call(aten.div.Tensor, total, size))


def _counted_once(e: Emission, x: fx.Node, dim: int, value: fx.Node) -> fx.Node:
    """The positions of `dim` that no lower rank holds too, so that a sum counts each once."""
    if e.held_once(x):
        return value
    size = e.labels.atoms[x].shape[dim]
    seen: set[int] = set()
    for rank in range(e.rank):
        seen.update(e.box(x, rank)[dim] or range(size))
    mine = e.box(x)[dim] or range(size)
    return e.take(value, dim, tuple(i for i, p in enumerate(mine) if p not in seen))


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

    def mapping(rank: int) -> tuple[tuple[int, ...], bool]:
        """(kv head held for each query head, whether that is how the op groups them anyway)."""
        mine = e.box(q, rank)[1] or tuple(range(heads))
        held = e.box(k, rank)[1] or tuple(range(kv_heads))
        wanted = tuple(held.index(h // (heads // kv_heads)) for h in mine)
        group, rest = divmod(len(mine), len(held))
        return wanted, not rest and wanted == tuple(i // group for i in range(len(mine)))

    args.update(q=e.entering(q), k=e.entering(k), v=e.entering(v))
    mappings = [mapping(rank) for rank in range(e.world_size)]
    held = len(e.box(k)[1] or range(kv_heads))
    groups = {len(e.box(q, r)[1] or range(heads)) / len(e.box(k, r)[1] or range(kv_heads))
              for r in range(e.world_size)}  # fmt: skip
    # on every rank: backward runs in step, and an engine's cache is the same everywhere
    if len(groups) > 1 or not all(regular for _, regular in mappings):
        held = len(mappings[e.rank][0])
        for name in ("k", "v"):
            args[name] = e.take(args[name], 1, mappings[e.rank][0])
    mine = e.box(q)[1] or tuple(range(heads))
    args["head_offset"] = mine[0]
    for name, dim in (("sinks", 0), ("alibi_slopes", 0), ("bias", 1)):
        value = args[name]
        if value is None:
            continue
        shape = unit_shape(value)

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
    found = e.call(aten.embedding.default, weight, rows)
    found = e.call(aten.masked_fill.Scalar, found, e.call(aten.unsqueeze.default, outside, -1), 0)
    e.env[node] = e.reduce(found)
    e.env[node].meta[LOOKUP] = (weight, e.env[args["indices"]])


RULES: Mapping[Any, Rule] = {
    VOCABULARY: _vocabulary,
    operator.getitem: _getitem,
    Kind.STRUCTURE: _structure,
    Kind.POINTWISE: _pointwise,
    Kind.LINEAR: _linear,
    Kind.COMPLEX: _complex,
    Kind.MEAN: _mean,
    Kind.NORM: _norm,
    Kind.ATTENTION: _attention,
}
