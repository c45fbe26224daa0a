"""How far out the pieces of a mask begin: a bound from the constants that decide its entries.

    (i - j < 128) | (j // 64 == 0)      128, and 64 times what is compared with

Positions enter as linear terms. Two lines with rational coefficients ``p / q`` meet no farther
out than the sum of the constants times all p and q; beyond that no new piece begins. What comes
back every p positions (a remainder, bits of a position) grows as slowly as ``1 / p`` if counted.
Logarithms, powers and quotients of positions, and positions in dtypes too narrow to tell
neighbours apart, have no such bound (`unbounded`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import fx

from fxport.capture.arguments import arguments, shape_of
from fxport.passes.attention.views import CASTS, moved_input, overload_packet
from fxport.passes.constants import is_symbolic
from fxport.passes.masks.blocks import reach_in_blocks
from fxport.passes.masks.counted import without_constant
from fxport.passes.masks.values import constant_value

__all__ = ["PADS", "PRODUCTS", "WRITES", "is_plain_position", "reach", "unbounded"]

aten = torch.ops.aten

_COMPARISONS = {aten.eq, aten.ne, aten.lt, aten.le, aten.gt, aten.ge}
_BENDS = {
    aten.clamp, aten.clamp_min, aten.clamp_max, aten.minimum, aten.maximum, aten.abs, aten.sign,
    aten.relu,
}  # fmt: skip
PRODUCTS = {aten.mul, aten.div, aten.floor_divide, aten.remainder, aten.fmod, aten.true_divide}
_STEPS = {aten.floor_divide, aten.remainder, aten.fmod, aten.floor, aten.ceil, aten.trunc}
_BITS = {aten.bitwise_and, aten.bitwise_or, aten.bitwise_xor, aten.__and__, aten.__or__}
_CURVES = {aten.exp, aten.log, aten.sqrt, aten.pow}
_GATHERS = {aten.index, aten.embedding, aten.index_select}
PADS = {aten.pad, aten.constant_pad_nd}
WRITES = {aten.slice_scatter, aten.select_scatter}
_CUTS = {aten.slice, aten.select, aten.narrow}
_PREFIXES = {aten.tril, aten.triu, aten.cumsum}
# Of these only the positions that enter are compared; other values are put at other places.
_MOVE = _PREFIXES | WRITES | _CUTS
_INEXACT = {torch.bfloat16, torch.float16}
_WRAPPING = {torch.int8, torch.uint8, torch.int16}
_MAX_FACTORS = 64  # entries of a stored tensor that positions are multiplied by
_MAX_DENOMINATOR = 10**6
_FAR = 10**9


def unbounded(nodes: Sequence[fx.Node]) -> fx.Node | None:
    """An operation on positions after which constants say nothing about where pieces begin."""
    indices = _index_valued(nodes)
    decided = _deciding(nodes, indices)
    for node in nodes:
        if _is_static(node):
            continue
        packet = overload_packet(node)
        curved = packet in _CURVES and any(n in indices for n in node.all_input_nodes)
        if curved or (packet in PRODUCTS and _divides_by(node, indices)):
            return node
        dtype = node.meta["val"].dtype
        if node in indices and (dtype in _WRAPPING or (dtype in _INEXACT and node in decided)):
            return node
        repeats = packet in PRODUCTS or (packet in _BITS and node in indices)
        if repeats and node in decided and _factors(node, indices) is None:
            return node
    return None


def _is_static(node: fx.Node) -> bool:
    return all(isinstance(size, int) for size in shape_of(node))


def _divides_by(node: fx.Node, indices: set[fx.Node]) -> bool:
    divisor = node.args[1] if len(node.args) > 1 else None
    return overload_packet(node) is not aten.mul and divisor in indices


def reach(nodes: Sequence[fx.Node]) -> int:
    """A bound on row and column at which a piece begins; `unbounded(nodes)` is None."""
    indices = _index_valued(nodes)
    decided = _deciding(nodes, indices)
    sizes = {size for node in decided & indices if (size := _divisor(node)) is not None}
    if len(sizes) == 1:
        bound = reach_in_blocks(list(decided), indices, *sizes)
        if bound is not None:
            return bound
    return _reach_by_factors(decided, indices)


def _divisor(node: fx.Node) -> int | None:
    """By which whole number positions are divided here; None if they are not."""
    divided = overload_packet(node) in (PRODUCTS | _STEPS) - {aten.mul}
    divisor = node.args[1] if divided and len(node.args) > 1 else None
    if not isinstance(divisor, int | float) or divisor <= 1 or divisor != int(divisor):
        return None
    return int(divisor)


def _reach_by_factors(decided: set[fx.Node], indices: set[fx.Node]) -> int:
    total, factor = 1.0, 1.0
    for node in decided:
        packet = overload_packet(node)
        if _is_static(node):
            constants = _values(node) or []
            total += max(map(abs, constants), default=0)
            factor *= max(map(_denominator, constants), default=1)
            continue
        if packet in PRODUCTS:
            factor *= math.prod(_factors(node, indices) or [1])
            continue
        if packet in _BITS and node in indices:
            factor *= math.prod(2 ** n.bit_length() for n in _factors(node, indices) or [1])
        given = arguments(node)
        if packet in (aten.add, aten.sub, aten.rsub):
            factor *= _size_of(given.get("alpha", 1))
        elif packet is aten.arange:
            factor *= _size_of(given.get("step", 1) or 1)
        if packet in _GATHERS:
            total += max((s for s in shape_of(_table(node)) if isinstance(s, int)), default=0)
            continue
        constants = _numbers(node)
        total += sum(abs(c) for c in constants)
        factor *= math.prod(_denominator(c) for c in constants)
        if factor > _FAR or total > _FAR:
            return _FAR
    bound = total * factor * (2 if factor > 1 else 1)
    return math.ceil(min(bound, _FAR))


def is_plain_position(node: fx.Node) -> bool:
    """Whether the values are ``0, 1, 2, ..``, maybe repeated along other dimensions."""
    while overload_packet(node) is not aten.arange:
        before = moved_input(node)
        if before is None and overload_packet(node) in CASTS:
            before = node.args[0] if isinstance(node.args[0], fx.Node) else None
            if before is not None and node.meta["val"].dtype not in (torch.int64, torch.int32):
                return False
        if before is None:
            return False
        node = before
    given = arguments(node)
    return given.get("start", 0) in (0, None) and given.get("step", 1) in (1, None)


def _index_valued(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """Values that grow with the position: made from arange or cumsum, not yet compared."""
    found: set[fx.Node] = set()
    for node in sorted(nodes):
        if node.meta["val"].dtype == torch.bool or _is_static(node):
            continue
        grows = overload_packet(node) in (aten.arange, aten.cumsum)
        if grows or any(i in found for i in node.all_input_nodes):
            found.add(node)
    return found


def _deciding(nodes: Sequence[fx.Node], indices: set[fx.Node]) -> set[fx.Node]:
    """Operations on positions that decide an entry, and what enters them."""
    found: set[fx.Node] = set()
    pending = [n for n in nodes if _decides(n, indices)]
    while pending:
        node = pending.pop()
        if node in found:
            continue
        found.add(node)
        if _is_static(node):
            continue  # one constant, whatever it was computed from
        values = node.all_input_nodes
        if overload_packet(node) in _PREFIXES:  # it moves values and compares positions
            values = [n for n in values if n in indices]
        pending.extend(n for n in values if not is_symbolic(n) and not _is_decided(n))
    return found


def _decides(node: fx.Node, indices: set[fx.Node]) -> bool:
    packet = overload_packet(node)
    if packet in (aten.tril, aten.triu, aten.cat) or packet in PADS or packet in WRITES:
        return True
    if packet in _CUTS:  # what was at 40 is at 0: every piece of it begins elsewhere
        return any(_numbers(node))
    if not any(i in indices for i in node.all_input_nodes):
        return False
    if packet in _COMPARISONS or packet in _BENDS or packet in _STEPS or packet in _GATHERS:
        return True
    if packet is aten.div and arguments(node).get("rounding_mode") is not None:
        return True
    dtype = node.meta["val"].dtype
    truncates = packet in CASTS and not dtype.is_floating_point
    return bool(dtype == torch.bool or truncates)


def _is_decided(node: fx.Node) -> bool:
    return bool(node.meta["val"].dtype == torch.bool) and overload_packet(node) not in _PREFIXES


# -- constants -------------------------------------------------------------------------------------


def _size_of(factor: object) -> int:
    """The larger of p and q of a factor ``p / q``."""
    if not isinstance(factor, int | float) or not math.isfinite(factor):
        return _FAR
    fraction = Fraction(factor).limit_denominator(_MAX_DENOMINATOR)
    if factor and abs(float(fraction) - factor) > 1e-9 * abs(factor):
        return _FAR
    return max(abs(fraction.numerator), fraction.denominator)


def _denominator(constant: float) -> int:
    return 1 if float(constant).is_integer() else min(_size_of(constant), _MAX_DENOMINATOR)


def _factors(node: fx.Node, indices: set[fx.Node]) -> list[int] | None:
    """Sizes of what positions are multiplied or divided by; None when that cannot be told."""
    found: list[int] = []
    for operand in node.args[:2]:
        if not isinstance(operand, fx.Node):
            found.append(_size_of(operand))
        elif operand not in indices and not _is_decided(operand):
            values = _values(operand)
            if values is None or len(values) > _MAX_FACTORS:
                return None
            found += [_size_of(v) for v in values if v]
    return found


def _values(node: fx.Node) -> list[float] | None:
    """The finite values of a constant whose shape does not depend on the length."""
    if not _is_static(node):
        return None
    try:
        value = constant_value(node, {})
    except ValueError:  # sizes enter it
        return None
    if value.dtype == torch.bool:
        return []
    return [float(v) for v in value[value.isfinite()].double().unique()]


def _table(node: fx.Node) -> fx.Node:
    table = next(iter(arguments(node).values()))
    assert isinstance(table, fx.Node)
    return table


def _numbers(node: fx.Node) -> list[float]:
    """Finite numbers in a call; infinities are values, not positions."""
    found: list[float] = []
    given = arguments(node)
    if overload_packet(node) in _CUTS:
        given = {"start": given.get("start", given.get("index"))}
    elif overload_packet(node) in WRITES:  # the end of everything is no place
        places = [given.get(name) for name in ("start", "end", "index")]
        return [float(p) for p in places if isinstance(p, int) and p < _FAR]
    elif overload_packet(node) is aten.cat:
        sizes = [shape_of(tensor)[given["dim"]] for tensor in given["tensors"]]
        return [float(size) for size in sizes if isinstance(size, int)]
    for name, value in given.items():
        if name in ("dim", "alpha", "step") or isinstance(value, bool):
            continue
        if isinstance(value, fx.Node) and is_symbolic(value):  # 5 in ``i >= j - T + 5``
            value = without_constant(value)[1]
        numbers = value if isinstance(value, list | tuple) and name != "size" else [value]
        found += [float(n) for n in numbers if isinstance(n, int | float)]
    return [c for c in found if math.isfinite(c)]
