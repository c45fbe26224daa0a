"""How views, splits, slices and permutations are written for one rank's part.

Before                                  After, rank 0 of 2
    q = view(y [B, T, 96], B, T, 4, 24)     q = reshape(y [B, T, 48], B, T, 2, 24)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxport.capture.arguments import arguments, shape_of
from fxport.passes.tensor_parallel.boxes import Box, Undividable, select
from fxport.passes.tensor_parallel.emission import Emission
from fxport.passes.tensor_parallel.factors import unit_shape, unit_value
from fxport.passes.tensor_parallel.mixed import LOCAL_SIZE, is_mixed, keeps_order, local_size

__all__ = ["emit_structure"]

aten = torch.ops.aten


def _sized(e: Emission, node: fx.Node, sizes: Any, local: tuple[int, ...]) -> list[Any]:
    result: list[Any] = []
    for size, here, before in zip(sizes, local, unit_shape(node), strict=True):
        if isinstance(size, fx.Node):
            made = e.env[size] if here == before else local_size(e, size, here, before)
            if made is None:
                raise Undividable(node, "a divided size is an expression", [e.labels.atoms[node]])
            result.append(made)
        else:
            result.append(size if size == -1 else here)
    return result


def _shape(box: Box, full: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n if i is None else len(i) for i, n in zip(box, full, strict=True))


def emit_structure(e: Emission, node: fx.Node) -> None:
    """The same op with this rank's sizes; checked on the labels, position by position."""
    if node in e.labels.spread:
        _copies(e, node)
        return
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
    if any(map(is_mixed, (*inputs, node))) and not _order_kept(e, node, target, args, inputs):
        raise Undividable(node, "heads and batch share a dimension in another order",
                          [e.labels.atoms[i] for i in inputs])  # fmt: skip
    new = {k: fx.map_arg(v, lambda n: _operand(e, n)) for k, v in args.items()}
    e.env[node] = e.call(target, **new)
    e.local.add(node)


def _copies(e: Emission, node: fx.Node) -> None:
    """As many copies as this rank has heads."""
    source = arguments(node)["self"]
    atoms = e.labels.atoms[node]
    if source in e.local:
        raise Undividable(node, "a divided vector for all heads", [e.labels.atoms[source], atoms])
    before, here = e.labels.atoms[source].shape, select(atoms, e.box(node)).shape
    if here[-1] != before[-1]:
        raise Undividable(node, "the vector's own positions are divided", [atoms])
    full = atoms.shape
    sizes = [-1 if n == m else k for n, m, k in zip(before, full, here, strict=True)]
    e.env[node] = e.call(aten.expand.default, e.entering(source), sizes)
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
    step = here[1] - here[0] if len(here) > 1 else 1
    if not here or here != list(range(here[0], here[-1] + 1, step)):
        raise Undividable(node, "a slice takes scattered positions", [e.labels.atoms[args["self"]]])
    return {**args, "start": here[0], "end": here[-1] + 1, "step": step}


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


def _order_kept(
    e: Emission, node: fx.Node, target: Any, args: dict[str, Any], inputs: list[fx.Node]
) -> bool:
    """Of the whole op, and of this rank's."""
    atoms = e.labels.atoms[node]
    if not isinstance(atoms, Tensor):
        return False
    old = {new: old for old, new in e.env.items()}

    def size(value: fx.Node) -> Any:
        if value in inputs:
            return value
        if LOCAL_SIZE in value.meta:
            return value.meta[LOCAL_SIZE]
        number = old.get(value, value).meta["val"]
        return number.node.expr if isinstance(number, torch.SymInt) else number

    shapes: dict[fx.Node, Sequence[Any]] = {i: shape_of(i) for i in inputs}
    whole = {i: e.labels.atoms[i] for i in inputs}
    here = {i: select(e.labels.atoms[i], e.box(i)) for i in inputs}
    mine = select(atoms, e.box(node))
    named = {k: fx.map_arg(v, size) for k, v in arguments(node).items()}
    if "size" in named and target is aten.reshape.default:  # a view
        named["shape"] = named.pop("size")
    local = {k: fx.map_arg(v, size) for k, v in args.items()}
    return keeps_order(target, named, whole, shapes, atoms, shape_of(node)) and keeps_order(
        target, local, here, shapes, mine, shape_of(node)
    )
