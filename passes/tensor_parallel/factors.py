"""Labels every position of every activation's features with the class it belongs to.

Batch and time have size 1 here; views, splits, slices and permutations run on the labels
themselves, so that every layout of a fused projection is understood without a rule of its own.

    h [B, T, C] -> linear -> [B, T, 3C] -> split, view, transpose -> q [B, H, T, D]
    labels of the 3C outputs: one class for each head, spread over q, k and v rows

Two positions are in one class when they must live on the same rank: operands of a pointwise op,
the channels of one head, a query head and its kv head.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterable
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from fxport.capture.arguments import arguments, shape_of
from fxport.capture.inputs import InputKind, graph_input
from fxport.passes.tensor_parallel.contraction import BY_EXPERT, contraction
from fxport.passes.tensor_parallel.labels import Attention, Labels, Linear
from fxport.passes.tensor_parallel.ops import KINDS, Kind
from fxport.passes.tensor_parallel.spread import REPEATING, spreads

__all__ = [
    "keep_beside_vocabulary",
    "label",
    "unit_shape",
    "unit_value",
]

aten = torch.ops.aten


def unit_value(value: Any) -> Any:
    """An argument with every symbol replaced by 1."""
    if isinstance(value, fx.Node):
        value = value.meta["val"]
    if isinstance(value, torch.SymInt):
        return _of_ones(value.node.expr)
    if isinstance(value, (list, tuple)):
        return [unit_value(v) for v in value]
    return value


def unit_shape(node: fx.Node) -> tuple[int, ...]:
    """Shape of a value with batch and time 1."""
    return tuple(size if isinstance(size, int) else _of_ones(size) for size in shape_of(node))


@functools.lru_cache(maxsize=1024)
def _of_ones(size: sympy.Expr) -> int:
    """Asked again for every node, and slow: a model has few different sizes."""
    return int(size.subs(dict.fromkeys(size.free_symbols, 1)))


def label(
    gm: fx.GraphModule,
    world_size: int,
    *,
    without_tokens: frozenset[str] = frozenset(),
    equal_heads: bool = False,
) -> Labels:
    """Labels a captured graph after the attention rewrite.

    Args:
        without_tokens: inputs that do not depend on the tokens (positions): like constants, what
            is made of them is on every rank and is cut where it is used.
        equal_heads: every rank has as many heads as any other (one cache layout for all).
    """
    labels = Labels(equal_heads=equal_heads)
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            found = graph_input(node)
            data = found.kind is InputKind.DATA and found.name not in without_tokens
            if data and _is_tensor(node):
                labels.atoms[node] = labels.classes.fresh(unit_shape(node))
                _force(labels, node, labels.atoms[node], "input of the model")
        elif node.op == "output":
            for value in node.all_input_nodes:
                if value in labels.atoms:
                    _force(labels, node, labels.atoms[value], "output of the model")
        elif node.op == "call_function" and any(i in labels.atoms for i in node.all_input_nodes):
            _label_call(labels, node, world_size)
    _settle(labels)
    return labels


def keep_beside_vocabulary(labels: Labels, vocabulary: Iterable[fx.Node]) -> None:
    """What a head with a divided vocabulary reads is on every rank."""
    for node in vocabulary:
        if node.target is aten.linear.default:
            atoms = labels.atoms[arguments(node)["input"]]
            _force(labels, node, atoms, "the vocabulary is divided")


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def _label_call(labels: Labels, node: fx.Node, world_size: int) -> None:
    if node.target is operator.getitem:
        source, index = node.args
        assert isinstance(source, fx.Node)
        found = labels.atoms[source]
        labels.atoms[node] = found[index]
        return
    if not isinstance(node.meta["val"], (Tensor, tuple, list)):
        return
    kind = KINDS.get(node.target)
    if kind is Kind.STRUCTURE and (_spread(labels, node) or _structure(labels, node)):
        return
    if kind is Kind.POINTWISE:
        _pointwise(labels, node)
    elif kind is Kind.LINEAR and arguments(node)["weight"] not in labels.atoms:
        _linear(labels, node)
    elif kind is Kind.CONTRACTION:
        _contraction(labels, node)
    elif kind is Kind.EMBEDDING:
        _leaf(labels, node)
    elif kind is Kind.NORM:
        _norm(labels, node)
    elif kind is Kind.MEAN:
        _mean(labels, node)
    elif kind is Kind.CAST:
        source = arguments(node)["self"]
        if source in labels.atoms:  # else it is what it was before: on every rank
            labels.atoms[node] = labels.atoms[source]
    elif kind is Kind.HALVES:
        _halves(labels, node)
    elif kind is Kind.COMPLEX:
        _complex(labels, node)
    elif kind is Kind.ATTENTION:
        _attention(labels, node, world_size)
    else:
        _unknown(labels, node)


def _leaf(labels: Labels, node: fx.Node) -> Tensor:
    atoms = labels.classes.fresh(unit_shape(node))
    labels.atoms[node] = labels.leaves[node] = atoms
    return atoms


def _force(labels: Labels, node: fx.Node, atoms: Any, why: str) -> None:
    for part in atoms if isinstance(atoms, (tuple, list)) else (atoms,):
        labels.full.append((part, node, why))


def _unknown(labels: Labels, node: fx.Node) -> None:
    why = f"no rule for {node.target}"
    for value in node.all_input_nodes:
        if value in labels.atoms:
            _force(labels, node, labels.atoms[value], why)
    value = node.meta["val"]
    if isinstance(value, Tensor):
        _force(labels, node, _leaf(labels, node), why)
        return
    parts = []
    for part in value:
        shape = [unit_value(s) for s in part.shape]
        parts.append(labels.classes.fresh(shape))
    labels.atoms[node] = tuple(parts)
    _force(labels, node, labels.atoms[node], why)


def _spread(labels: Labels, node: fx.Node) -> bool:
    atoms = labels.atoms.get(arguments(node)["self"]) if node.target in REPEATING else None
    if not isinstance(atoms, Tensor) or not spreads(node, atoms, unit_shape(node)):
        return False
    _force(labels, node, atoms, "every head has a copy")
    labels.atoms[node] = labels.classes.fresh(unit_shape(node))
    labels.spread.add(node)
    return True


def _structure(labels: Labels, node: fx.Node) -> bool:
    """Runs the op on the labels; False when it has an operand without labels."""
    if any(_is_tensor(i) and i not in labels.atoms for i in node.all_input_nodes):
        return False

    def known(value: fx.Node) -> Any:
        return labels.atoms[value] if value in labels.atoms else unit_value(value)

    args = fx.map_arg(node.args, known)
    kwargs = fx.map_arg(node.kwargs, known)
    target: Any = node.target
    if target is aten.view.default:
        target = aten.reshape.default
    try:
        result = target(*args, **kwargs)
    except (RuntimeError, IndexError):  # has another meaning at size 1: no rule
        return False
    if isinstance(result, Tensor):
        if tuple(result.shape) != unit_shape(node):
            return False
        labels.atoms[node] = result
    else:
        labels.atoms[node] = tuple(result)
    return True


def _pointwise(labels: Labels, node: fx.Node) -> None:
    shape = unit_shape(node)
    chosen: Tensor | None = None
    for value in node.all_input_nodes:
        if value not in labels.atoms:
            continue
        atoms = labels.atoms[value]
        if atoms.numel() != math.prod(shape) or atoms.unique().numel() != atoms.numel():
            continue  # spread over several positions: it is wanted wherever they are
        atoms = atoms.reshape(shape)
        if chosen is None:
            chosen = atoms
        else:
            labels.classes.pair(chosen, atoms)
    if chosen is None:
        broadcast = [labels.atoms[v] for v in node.all_input_nodes if v in labels.atoms]
        largest = max(broadcast, key=lambda a: a.numel())
        if largest.numel() != math.prod(shape):
            _unknown(labels, node)
            return
        chosen = largest.reshape(shape)
        for atoms in broadcast:
            if atoms.numel() == chosen.numel():
                labels.classes.pair(chosen, atoms.reshape(shape))
    for atoms in (labels.atoms[v] for v in node.all_input_nodes if v in labels.atoms):
        if 1 < atoms.numel() < chosen.numel() and atoms.unique().numel() == atoms.numel():
            gates, order = atoms.broadcast_to(shape).flatten().sort(stable=True)
            groups = chosen.flatten()[order].reshape(atoms.numel(), -1)
            labels.gates.append((groups, gates.reshape(groups.shape)[:, 0]))
    labels.atoms[node] = chosen


def _linear(labels: Labels, node: fx.Node) -> None:
    inputs = labels.atoms[arguments(node)["input"]]
    outputs = _leaf(labels, node)
    if inputs.numel() == inputs.shape[-1]:
        labels.linears.append(Linear(node, inputs.reshape(-1), outputs.reshape(-1)))
        return
    for one, other in zip(
        inputs.reshape(-1, inputs.shape[-1]), outputs.reshape(-1, outputs.shape[-1]), strict=True
    ):  # one small projection for each head
        labels.classes.union_all(torch.cat([one, other]))


def _contraction(labels: Labels, node: fx.Node) -> None:
    found = contraction(node, labels.atoms)
    if found is None:
        _unknown(labels, node)
        return
    outputs = _leaf(labels, node)
    sizes = dict(zip(found.of_data, labels.atoms[found.data].shape, strict=True))
    rows, shared = (math.prod(sizes[c] for c in part) for part in (found.rows, found.shared))

    def by_product(atoms: Tensor, of: str, last: str) -> Tensor:
        order = [of.index(c) for c in found.rows + found.shared + last]
        return atoms.permute(order).reshape(rows * shared, -1)

    pairs = list(
        zip(
            by_product(labels.atoms[found.data], found.of_data, found.summed),
            by_product(outputs, found.of_result, found.new),
            strict=True,
        )
    )
    if node.target is BY_EXPERT:  # each row with another expert, all divided in the same way
        for one, other in pairs[1:]:
            labels.classes.pair(pairs[0][0], one)
            labels.classes.pair(pairs[0][1], other)
        pairs, rows = pairs[:1], 1
    if rows > 1:  # one small projection for each head
        for one, other in pairs:
            labels.classes.union_all(torch.cat([one, other]))
    elif shared > 1:
        labels.shared.append([Linear(node, one, other) for one, other in pairs])
    else:
        labels.linears += [Linear(node, one, other) for one, other in pairs]


def _norm(labels: Labels, node: fx.Node) -> None:
    found = arguments(node)
    atoms = labels.atoms[found["input"]]
    width = math.prod(found["normalized_shape"])
    groups = atoms.reshape(-1, width)
    statistics = labels.classes.fresh([groups.shape[0]])
    labels.reductions.append((node, groups, statistics))
    labels.atoms[node] = atoms


def _mean(labels: Labels, node: fx.Node) -> None:
    found = arguments(node)
    atoms = labels.atoms[found["self"]]
    dims = found["dim"]
    if not dims or len(dims) != 1:
        _unknown(labels, node)
        return
    moved = atoms.movedim(dims[0], -1)
    result = labels.classes.fresh(unit_shape(node))
    if node.target is aten.sum.dim_IntList and dims[0] % atoms.dim() != atoms.dim() - 1:
        for summand in moved.unbind(-1):  # of experts, say: as if they were added one by one
            labels.classes.pair(result.reshape(-1), summand.reshape(-1))
        labels.atoms[node] = result
        return
    labels.reductions.append((node, moved.reshape(-1, moved.shape[-1]), result.reshape(-1)))
    labels.atoms[node] = result


def _complex(labels: Labels, node: fx.Node) -> None:
    atoms = labels.atoms[arguments(node)["self"]]
    if node.target is aten.view_as_real.default:
        labels.atoms[node] = torch.stack([atoms, atoms], dim=-1)
        return
    labels.classes.pair(atoms[..., 0], atoms[..., 1])
    labels.atoms[node] = atoms[..., 0]


def _halves(labels: Labels, node: fx.Node) -> None:
    found = arguments(node)
    first, second = labels.atoms[found["self"]].chunk(2, found["dim"])
    labels.classes.pair(first, second)
    labels.atoms[node] = first


def _attention(labels: Labels, node: fx.Node, world_size: int) -> None:
    found = arguments(node)
    q, k, v = (labels.atoms.get(found[name]) for name in ("q", "k", "v"))
    if q is None or k is None or v is None or found["bias"] in labels.atoms or q.shape[0] != 1:
        _unknown(labels, node)
        return
    heads, kv_heads = q.shape[1], k.shape[1]
    out = labels.classes.fresh((1, heads, 1, v.shape[3]))
    stats = labels.classes.fresh((1, heads, 1))
    labels.atoms[node] = (out, stats)
    labels.leaves[node] = out
    uneven = labels.equal_heads and kv_heads % world_size != 0
    shared = kv_heads < heads and (kv_heads < world_size or uneven)
    if labels.equal_heads and heads % world_size:
        _force(labels, node, q, f"{heads} heads do not divide by {world_size} ranks")
    for head in range(heads):
        labels.classes.union_all(torch.cat([x[:, head].reshape(-1) for x in (q, out, stats)]))
    for head in range(kv_heads):
        labels.classes.union_all(torch.cat([k[:, head].reshape(-1), v[:, head].reshape(-1)]))
    if not shared:
        for head in range(heads):
            kv = head // (heads // kv_heads)
            labels.classes.union(int(q[0, head, 0, 0]), int(k[0, kv, 0, 0]))
    labels.attentions.append(Attention(node, q, k, v, shared))


def _by_head(labels: Labels, products: list[Linear]) -> bool:
    """Whether one side of each product is one class, and it has become that of the other, too."""
    sides = ([p.inputs for p in products], [p.outputs for p in products])
    if not any(all(len(a) > 1 and len(labels.classes.of(a)) == 1 for a in side) for side in sides):
        return False
    for product in products:
        labels.classes.union_all(torch.cat([product.inputs, product.outputs]))
    return True


def _settle(labels: Labels) -> None:
    """What depends on the classes, once they are known.

    The result of a head's own product belongs to the head; that of an expert's hidden features
    does not, as they may be divided. A statistic over positions of one class belongs to it; any
    other is everybody's. A head's gate belongs to the head, unless every rank has it.
    """
    waiting = labels.shared
    while waiting:
        left = [products for products in waiting if not _by_head(labels, products)]
        if len(left) == len(waiting):
            break
        waiting = left
    for products in waiting:
        labels.linears += products
    for node, groups, results in labels.reductions:
        for group, result in zip(groups, results.tolist(), strict=True):
            if len(labels.classes.of(group)) == 1:
                labels.classes.union(int(group[0]), result)
            else:
                labels.full.append((torch.tensor([result]), node, "a moment over several classes"))
    whole = {one for atoms, _, _ in labels.full for one in labels.classes.of(atoms)}
    for groups, gates in labels.gates:
        for group, gate in zip(groups, gates.tolist(), strict=True):
            if labels.classes.find(gate) not in whole and len(labels.classes.of(group)) == 1:
                labels.classes.union(int(group[0]), gate)
