"""Products of two tensors, whatever they are spelled as, by the labels of their dimensions.

matmul(a, b)  [.., i, c] [.., c, j] -> [.., i, j]        einsum("bthd,bshd->bhts", a, b)
(a[.., :, None, :] * b[.., None, :, :]).sum(-1)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxport.capture.arguments import arguments, shape_of
from fxport.passes.attention.layout import Dims, Factor, LayoutError, align
from fxport.passes.attention.views import number, overload_packet

__all__ = ["Contraction", "Product", "as_product", "contract", "factors_of", "sums_products"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Product:
    """``alpha * einsum(left, right) + beta * added``.

    Attributes:
        node: the call.
        labels: of left's, right's and the result's dimensions.
        added: what addmm or baddbmm adds, if anything.
    """

    node: fx.Node
    left: fx.Node
    right: fx.Node
    labels: tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]
    alpha: float = 1.0
    added: fx.Node | None = None
    beta: float = 1.0


def as_product(node: fx.Node) -> Product | None:
    """The product that a node computes, or None."""
    rule = _RULES.get(overload_packet(node))
    return rule(node) if rule is not None else None


def sums_products(node: fx.Node) -> bool:
    """Whether a node is a product of tensors summed up, of a kind that has a rule or not."""
    packet = overload_packet(node)
    return packet in _UNRULED or (packet in _RULES and packet is not aten.sum)


def _names(count: int) -> tuple[str, ...]:
    return tuple(f"n{i}" for i in range(count))


def _matmul(node: fx.Node) -> Product | None:
    given = list(arguments(node).values())
    left, right = given[0], given[1]
    ranks = len(shape_of(left)), len(shape_of(right))
    if min(ranks) < 2:
        return None
    batch = _names(max(ranks) - 2)
    labels = (
        (*batch[len(batch) - ranks[0] + 2 :], "i", "c"),
        (*batch[len(batch) - ranks[1] + 2 :], "c", "j"),
        (*batch, "i", "j"),
    )
    return Product(node, left, right, labels)


def _linear(node: fx.Node) -> Product | None:
    given = arguments(node)
    if given["bias"] is not None or len(shape_of(given["weight"])) != 2:
        return None
    batch = _names(len(shape_of(given["input"])) - 1)
    labels = ((*batch, "c"), ("j", "c"), (*batch, "j"))
    return Product(node, given["input"], given["weight"], labels)


def _inner(node: fx.Node) -> Product | None:
    """``[.., i, c] [.., j, c] -> [.., i, .., j]``, every row of one with every row of the other."""
    given = arguments(node)
    left, right = given["self"], given["other"]
    rows, columns = (len(shape_of(x)) - 1 for x in (left, right))
    if min(rows, columns) < 1:
        return None
    names = _names(rows + columns)
    labels = ((*names[:rows], "c"), (*names[rows:], "c"), names)
    return Product(node, left, right, labels)


_TENSORDOT = ("dims_self", "dims_other")


def _tensordot(node: fx.Node) -> Product | None:
    """Sums over the dimensions of the one and of the other that are named."""
    given = arguments(node)
    left, right = given["self"], given["other"]
    ranks = len(shape_of(left)), len(shape_of(right))
    summed = [[d % r for d in given[n]] for n, r in zip(_TENSORDOT, ranks, strict=True)]
    names = _names(sum(ranks))
    first, second = list(names[: ranks[0]]), list(names[ranks[0] :])
    for index, (i, j) in enumerate(zip(*summed, strict=True)):
        first[i] = second[j] = f"c{index}"
    gone = {f"c{index}" for index in range(len(summed[0]))}
    result = tuple(name for name in (*first, *second) if name not in gone)
    return Product(node, left, right, (tuple(first), tuple(second), result)) if gone else None


def _addmm(node: fx.Node) -> Product | None:
    """``addmm`` or ``baddbmm``."""
    given = arguments(node)
    alpha, beta = number(given["alpha"]), number(given["beta"])
    if alpha is None or beta is None:
        return None
    batched = overload_packet(node) is aten.baddbmm
    left, right = ("batch1", "batch2") if batched else ("mat1", "mat2")
    n = ("n",) if batched else ()
    labels = ((*n, "i", "c"), (*n, "c", "j"), (*n, "i", "j"))
    # With beta == 0 the summand is ignored, even if it holds NaN.
    added = given["self"] if beta != 0 else None
    return Product(node, given[left], given[right], labels, alpha, added, beta)


def _einsum(node: fx.Node) -> Product | None:
    given = arguments(node)
    operands = given["tensors"]
    if len(operands) != 2:
        return None
    equation = given["equation"].replace(" ", "")
    inputs, arrow, result = equation.partition("->")
    terms = inputs.split(",")
    if len(terms) != 2:
        return None
    ranks = [len(shape_of(o)) for o in operands]
    widths = [r - len(t.replace("...", "")) for t, r in zip(terms, ranks, strict=True)]
    dots = _names(max(widths))
    left, right = (_labels(t, dots[len(dots) - w :]) for t, w in zip(terms, widths, strict=True))
    if not arrow:
        letters = inputs.replace("...", "").replace(",", "")
        once = "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
        result = ("..." if "..." in inputs else "") + once
    labels = (left, right, _labels(result, dots))
    if any(len(set(term)) != len(term) for term in labels):
        return None  # a diagonal
    return Product(node, operands[0], operands[1], labels)


def _labels(term: str, dots: tuple[str, ...]) -> tuple[str, ...]:
    before, ellipsis, after = term.partition("...")
    return (*before, *(dots if ellipsis else ()), *after)


def _summed(node: fx.Node) -> Product | None:
    """``(a * b).sum(dim)`` of broadcast factors."""
    given = arguments(node)
    factors, dims = given["self"], given.get("dim")
    if overload_packet(factors) is not aten.mul or dims is None or len(dims) != 1:
        return None
    left, right = factors.args[:2]
    if given.get("keepdim") or given.get("dtype") is not None:
        return None
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node) or left is right:
        return None
    if not all(isinstance(x.meta["val"], torch.Tensor) for x in (left, right)):
        return None
    dtypes = {x.meta["val"].dtype for x in (left, right, node)}
    rank = len(shape_of(factors))
    return _entry_by_entry(node, left, right, rank, dims[0]) if len(dtypes) == 1 else None


def _vecdot(node: fx.Node) -> Product | None:
    given = arguments(node)
    left, right = given["x"], given["y"]
    if left is right or left.meta["val"].is_complex() or right.meta["val"].is_complex():
        return None
    rank = max(len(shape_of(left)), len(shape_of(right)))
    return _entry_by_entry(node, left, right, rank, given["dim"])


def _entry_by_entry(
    node: fx.Node, left: fx.Node, right: fx.Node, rank: int, along: int
) -> Product | None:
    """The product of broadcast factors, summed along one of its `rank` dimensions."""
    names = _names(rank)
    if rank < 3:
        return None
    gone = along % rank
    labels = (
        names[len(names) - len(shape_of(left)) :],
        names[len(names) - len(shape_of(right)) :],
        names[:gone] + names[gone + 1 :],
    )
    return Product(node, left, right, labels)


def factors_of(node: fx.Node) -> Product | None:
    """The product whose factors a node multiplies entry by entry, to be summed by its user."""
    if overload_packet(node) is not aten.mul or len(node.users) != 1:
        return None
    user = next(iter(node.users))
    return _summed(user) if overload_packet(user) is aten.sum else None


_RULES: dict[Any, Callable[[fx.Node], Product | None]] = {
    aten.matmul: _matmul,
    aten.linalg_matmul: _matmul,
    aten.bmm: _matmul,
    aten.mm: _matmul,
    aten.linear: _linear,
    aten.inner: _inner,
    aten.tensordot: _tensordot,
    aten.linalg_vecdot: _vecdot,
    aten.addmm: _addmm,
    aten.baddbmm: _addmm,
    aten.einsum: _einsum,
    aten.sum: _summed,
}

_UNRULED = {aten.cdist, aten.bilinear, aten.linalg_multi_dot, aten.chain_matmul}


@dataclass(frozen=True)
class Contraction:
    """The dimensions of a product's result, and of what it sums over.

    Attributes:
        result: in left's axes where left varies, else in right's.
        summed: the axes summed over, in left's order.
    """

    result: Dims
    summed: Dims


def contract(labels: tuple[tuple[str, ...], ...], left: Dims, right: Dims) -> Contraction:
    """Identifies the axes of two operands that share a label.

    Raises:
        LayoutError: a label occurs in one operand only and is summed, or sizes do not pair up.
    """
    a, b, result = labels
    left_by, right_by = dict(zip(a, left, strict=True)), dict(zip(b, right, strict=True))
    merged: dict[str, tuple[Factor, ...]] = {}
    for label in dict.fromkeys((*a, *b)):
        x, y = left_by.get(label, ()), right_by.get(label, ())
        if label not in result and not (label in left_by and label in right_by):
            raise LayoutError
        if x and y:
            pairs = align(x, y)
            merged[label] = tuple(Factor(p.axis, p.repeated and q.repeated) for p, q in pairs)
        elif label not in result and (x or y):
            raise LayoutError  # a size-1 dimension broadcast against a summed one
        else:
            merged[label] = x or y
    summed = tuple(merged[label] for label in a if label not in result)
    return Contraction(tuple(merged[label] for label in result), summed)
