"""Dimensions of batch and heads together, as `nn.MultiheadAttention` has them.

Before                                   After, rank 0 of 2 with 4 heads
    q = view(x [T, B, 96], T, B * 4, 24)     q = view(x [T, B, 48], T, B * 4 * 2 // 4, 24)

Labels have one batch entry, and would not see a view that puts heads before the batch. So every
op that makes, moves or takes apart such a dimension is run on numbered positions of small sizes,
once on the full tensor and once on this rank's part: batch or time first, then features.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from fxport.capture.arguments import shape_of
from fxport.passes.tensor_parallel.factors import unit_shape

__all__ = ["LocalSize", "is_mixed", "keeps_order", "local_size", "size_expression"]

_SIZES = (2, 3, 5, 7)
_MOST = 256  # above the product of all


@dataclass(frozen=True)
class LocalSize:
    """A size of one rank's op that is known only when it runs.

    Attributes:
        here: its value with batch and time 1.
        expression: over symbols.
        write: makes the node in an `Emission`.
    """

    here: int
    expression: Any
    write: Callable[[Any], fx.Node]


def is_mixed(value: fx.Node) -> bool:
    """Whether a dimension is a symbol times a number of features above 1."""
    if not isinstance(value.meta["val"], Tensor):  # parts of a value, which is asked itself
        return False
    return any(
        not isinstance(size, int) and unit > 1
        for size, unit in zip(shape_of(value), unit_shape(value), strict=True)
    )


def size_expression(size: fx.Node) -> Any:
    """A size over symbols, or its number."""
    value = size.meta["val"]
    return value.node.expr if isinstance(value, torch.SymInt) else value


def local_size(size: fx.Node, here: int, before: int) -> LocalSize | None:
    """``size * here / before``, if `size` is `before` times a symbol."""
    expression = size_expression(size)
    if here == before:
        return LocalSize(here, expression, lambda e: e.env[size])
    number, symbol = sympy.sympify(expression).as_coeff_Mul()
    if number != before or not _is_symbol(symbol):
        return None

    def write(e: Any) -> fx.Node:
        product = e.call(operator.mul, e.env[size], here)
        new: fx.Node = e.call(operator.floordiv, product, before)
        product.meta["val"], new.meta["val"] = here * before, here  # with batch and time 1
        return new

    return LocalSize(here, symbol * here, write)


def _is_symbol(expression: Any) -> bool:
    return isinstance(expression, sympy.Symbol)


def keeps_order(
    target: Any,
    arguments: dict[str, Any],
    values: dict[fx.Node, Tensor],
    shapes: dict[fx.Node, Sequence[Any]],
    results: Sequence[tuple[Tensor, Sequence[Any]]],
) -> bool:
    """Whether an op maps numbered positions to numbered positions.

    Args:
        arguments: tensors as keys of `values`; sizes as ints and sympy expressions.
        values: atoms of the operands.
        shapes: their shapes over symbols; only the features' factors are read off `values`.
        results: atoms and shape of each.
    """
    known_shapes = [*shapes.values(), *(shape for _, shape in results)]
    symbols = sorted({s for one in known_shapes for n in one for s in _free(n)}, key=str)
    if len(symbols) > len(_SIZES):
        return False
    sizes = dict(zip(symbols, _SIZES, strict=False))
    counts = _counts(known_shapes, sizes)
    if counts is None:
        return False
    numbered = {node: _numbered(atoms, shapes[node], counts) for node, atoms in values.items()}
    wanted = [_numbered(result, shape, counts) for result, shape in results]
    if any(v is None for v in (*wanted, *numbered.values())):
        return False

    def known(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return numbered[value]
        if isinstance(value, (list, tuple)):
            return [known(v) for v in value]
        return int(value.subs(sizes)) if isinstance(value, sympy.Basic) else value

    try:
        found = target(**{name: known(value) for name, value in arguments.items()})
    except (RuntimeError, IndexError):
        return False
    parts = [found] if isinstance(found, Tensor) else list(found)
    if len(parts) != len(wanted):
        return False
    return all(w is not None and torch.equal(p, w) for p, w in zip(parts, wanted, strict=True))


def _free(size: Any) -> set[Any]:
    return set(getattr(size, "free_symbols", ()))


def _counts(shapes: Iterable[Sequence[Any]], sizes: dict[Any, int]) -> dict[Any, int] | None:
    """How many entries the tokens' part of each dimension has: a symbol, or a product of them.

    A product counts as a thing of its own: an op that takes it apart keeps no order that is known.
    """
    found = {n.as_coeff_Mul()[1] for shape in shapes for n in shape if not isinstance(n, int)}
    products = all(all(map(_is_symbol, sympy.Mul.make_args(part))) for part in found)
    return {part: int(part.subs(sizes)) for part in sorted(found, key=str)} if products else None


def _numbered(atoms: Tensor, shape: Sequence[Any], counts: dict[Any, int]) -> Tensor | None:
    """Every position's atom and coordinates; None where the coordinates are not known.

    A dimension ``symbol * n`` has n features for each entry of the symbol.
    """
    places = {part: _MOST**i for i, part in enumerate(counts)}
    number = atoms * _MOST ** len(counts)
    seen: set[Any] = set()
    split: list[int] = []
    for dim, size in enumerate(shape):
        rest = None if isinstance(size, int) else size.as_coeff_Mul()[1]
        if rest in seen:
            return None
        count = 1
        if rest is not None:
            seen.add(rest)
            count = counts[rest]
        line = torch.arange(count) * (places[rest] if count > 1 else 0)
        position = 2 * dim
        number = number.unsqueeze(position)
        number = number + line.reshape([-1 if d == position else 1 for d in range(number.dim())])
        split.append(count * atoms.shape[dim])
    return number.reshape(split)
