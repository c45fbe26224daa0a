"""One symbolic graph from the graphs of several plain lengths.

    T = 37:  slice(cos [512, 64], 0, 0, 37)   view(x, [2, 37, 64])   mask [37, 37] made by a loop
    T = 53:  slice(cos [512, 64], 0, 0, 53)   view(x, [3, 53, 64])   mask [53, 53]
    unified: slice(cos, 0, 0, T)              view(x, [B, T, 64])    slice(mask [L, L], ...)

Nodes that depend on the tokens must correspond one to one; numbers that differ must be
expressions in B and T. What does not depend on the tokens may differ in structure: it is
evaluated, and must be equal in all, or the beginning of one table of the longest length L, or
its end (``bias[:, :, :, -T:]``).
Every emitted shape is checked against every sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import fx

from fxport.capture.arguments import arguments, shape_of
from fxport.capture.emitter import Emitter, Unified
from fxport.capture.inputs import graph_input
from fxport.capture.location import user_location
from fxport.capture.sample import Sample
from fxport.capture.trace import quiet
from fxport.errors import PortError, Reason, ReasonCode

__all__ = ["NeedsTable", "unify"]

aten = torch.ops.aten

_NAMED = 6  # of the inputs that differ, in a reason

# Called with a symbolic size, these make it the size at hand for the whole graph.
_OF_ONE_SIZE = {aten.triu_indices.default, aten.tril_indices.default}


class NeedsTable(Exception):
    """A constant differs between lengths: a sample of the longest length is needed.

    Attributes:
        axes: how many of its axes grow with the length.
    """

    def __init__(self, axes: int) -> None:
        super().__init__("a table of the longest length is needed")
        self.axes = axes


def unify(samples: Sequence[Sample], longest: Sample | None = None) -> Unified:
    """Unifies at least three samples; `longest` gives the tables.

    Raises:
        PortError: the graphs differ in something that is no expression in B and T.
        NeedsTable: `longest` is None, and a constant differs between lengths.
    """
    with quiet():
        return _Unifier(samples, longest).run()


class _Differ(Exception):
    """Two constants do not have the same structure; their values decide."""


class _Unifier:
    def __init__(self, samples: Sequence[Sample], longest: Sample | None) -> None:
        self.samples = [*samples, *([longest] if longest else [])]
        self.longest = longest
        self.mapped: dict[tuple[fx.Node, ...], fx.Node] = {}
        self.emitter = Emitter(self.samples)
        # By the identities of the values, which are kept: another could get that of one let go.
        self.tables: dict[tuple[int, ...], tuple[list[torch.Tensor], fx.Node]] = {}

    def run(self) -> Unified:
        emitter = self.emitter
        firsts = [s.tokens for s in self.samples]
        self.mapped[tuple(firsts)] = emitter.tokens
        rows = [[n for n in s.varying if n.op == "call_function"] for s in self.samples]
        for nodes in zip(*rows, strict=False):
            self._node(nodes)
        self._same_length(rows)
        outputs = [s.output for s in self.samples]
        emitter.graph.output(self._args(tuple(o.args[0] for o in outputs), outputs))
        return emitter.finish()

    def _same_length(self, rows: list[list[fx.Node]]) -> None:
        if len({len(row) for row in rows}) > 1:
            longest = max(rows, key=len)
            raise PortError(
                [self._refusal(longest[min(map(len, rows))], "the number of operations")]
            )

    def _node(self, nodes: tuple[fx.Node, ...]) -> fx.Node:
        first = nodes[0]
        if any(n.target != first.target for n in nodes):
            raise PortError([self._refusal(first, f"the operation ({self._targets(nodes)})")])
        args = self._args(tuple(n.args for n in nodes), nodes)
        kwargs = self._args(tuple(dict(n.kwargs) for n in nodes), nodes)
        new = self.emitter.call(first.target, args, kwargs, nodes)
        self.mapped[nodes] = new
        return new

    def _targets(self, nodes: tuple[fx.Node, ...]) -> str:
        """The operation of the first sample, and the others with one size of input each."""
        sizes: dict[str, str] = {}
        for sample, node in zip(self.samples, nodes, strict=True):
            sizes.setdefault(str(node.target), f"{sample.batch} x {sample.length}")
        first, *others = sizes
        return ", ".join([first, *(f"{name} for {sizes[name]}" for name in others)])

    def _args(self, values: tuple[Any, ...], at: Sequence[fx.Node]) -> Any:
        """The common form of one argument of every sample."""
        first = values[0]
        if any(isinstance(v, fx.Node) for v in values):
            if not all(isinstance(v, fx.Node) for v in values):
                raise PortError([self._refusal(at[0], "an argument")])
            return self._value(values)
        if any(type(v) is not type(first) for v in values):
            raise PortError([self._refusal(at[0], "an argument")])
        if isinstance(first, list | tuple):
            if len({len(v) for v in values}) > 1:
                raise PortError([self._refusal(at[0], "the number of values")])
            return type(first)([self._args(column, at) for column in zip(*values, strict=True)])
        if isinstance(first, dict):
            return {k: self._args(tuple(v.get(k) for v in values), at) for k in first}
        if all(v == first for v in values) or values != values:
            return first
        if isinstance(first, int) and not isinstance(first, bool):
            return self._size(values, at)
        raise PortError([self._refusal(at[0], f"a number ({first}, {values[1]}, ...)")])

    def _size(self, values: tuple[int, ...], at: Sequence[fx.Node]) -> fx.Node | int:
        expression = self._expression(values)
        if expression is None:
            raise PortError([self._refusal(at[0], f"a size ({values[0]}, {values[1]}, ...)")])
        return self.emitter.size(expression)

    def _expression(self, values: Sequence[int]) -> sympy.Expr | None:
        """``a T + b``, ``a B + b`` or ``a B T + b`` through all values; None when there is none."""
        b, t = self.emitter.batch, self.emitter.length
        if len(set(values)) == 1:
            return sympy.Integer(values[0])
        for of in (t, b, b * t):
            at = [int(of.subs({b: s.batch, t: s.length})) for s in self.samples]
            i = next((i for i in range(len(at)) if at[i] != at[0]), None)
            if i is None:
                continue
            slope, rest = divmod(values[i] - values[0], at[i] - at[0])
            offset = values[0] - slope * at[0]
            if not rest and all(v == slope * a + offset for v, a in zip(values, at, strict=True)):
                return slope * of + offset
        return None

    # --- values that do not depend on the tokens ---------------------------------------------

    def _value(self, nodes: tuple[fx.Node, ...]) -> fx.Node:
        found = self.mapped.get(nodes)
        if found is not None:
            return found
        pairs = list(zip(self.samples, nodes, strict=True))
        if any(n in s.data for s, n in pairs):
            raise PortError([self._refusal(nodes[0], "which value is used")])
        if all(n.op == "placeholder" and n in s.learned for s, n in pairs):
            names = {graph_input(n).name for n in nodes}
            if len(names) != 1:
                raise PortError([self._refusal(nodes[0], "which parameter is used")])
            new = self.emitter.placeholder(graph_input(nodes[0]))
        elif any(n in s.learned for s, n in pairs):
            new = self._node_of_values(nodes)
        else:
            new = self._constant(nodes)
        self.mapped[nodes] = new
        return new

    def _node_of_values(self, nodes: tuple[fx.Node, ...]) -> fx.Node:
        if any(s.memory.written_by(n) for s, n in zip(self.samples, nodes, strict=True)):
            reason = Reason(
                ReasonCode.MUTATED_IN_PLACE,
                "a value made of parameters is changed in place",
                user_location(nodes[0]),
                "use the out-of-place operation",
            )
            raise PortError([reason])
        found = _part_taken(nodes)
        if found is None:
            return self._node(nodes)
        wholes, dim, ends = found
        part = self._value(wholes), dim, 0, self._size(ends, nodes)
        return self.emitter.call(aten.slice.Tensor, part, {}, nodes)

    def _constant(self, nodes: tuple[fx.Node, ...]) -> fx.Node:
        if not any(s.memory.written_by(n) for s, n in zip(self.samples, nodes, strict=True)):
            try:
                return self._structural(nodes)
            except _Differ:  # nodes emitted on the way have no users and are dropped at the end
                pass
        return self._by_value(nodes)

    def _structural(self, nodes: tuple[fx.Node, ...]) -> fx.Node:
        """Constants computed the same way stay computed: nothing needs to be stored."""
        first = nodes[0]
        if first.op != "call_function" or any(n.target != first.target for n in nodes):
            raise _Differ
        if first.target in _OF_ONE_SIZE:
            raise _Differ
        try:
            return self._node(nodes)
        except PortError as error:
            raise _Differ from error

    def _by_value(self, nodes: tuple[fx.Node, ...]) -> fx.Node:
        values = [s.value(n) for s, n in zip(self.samples, nodes, strict=True)]
        same = tuple(map(id, values))  # what every layer makes alike is compared and kept once
        if same in self.tables:
            return self.tables[same][1]
        if not all(isinstance(v, torch.Tensor) for v in values):
            raise PortError([self._refusal(nodes[0], "a constant that is no tensor")])
        if len({(v.dtype, v.device, v.dim()) for v in values}) > 1:
            raise PortError([self._refusal(nodes[0], "the type of a constant")])
        sizes = [
            self._expression([v.shape[axis] for v in values]) for axis in range(values[0].dim())
        ]
        if any(size is None for size in sizes):
            raise PortError([self._refusal(nodes[0], "the size of a constant")])
        new = self._table(nodes, values, [s for s in sizes if s is not None])
        self.tables[same] = values, new
        return new

    def _table(
        self, nodes: tuple[fx.Node, ...], values: list[torch.Tensor], sizes: list[sympy.Expr]
    ) -> fx.Node:
        length, batch = self.emitter.length, self.emitter.batch
        grows = [axis for axis, size in enumerate(sizes) if size.has(length)]
        repeats = [axis for axis, size in enumerate(sizes) if size == batch]
        if any(size.has(batch) and size != batch for size in sizes):
            raise PortError([self._refusal(nodes[0], "the size of a constant")])
        if grows and self.longest is None:
            raise NeedsTable(len(grows))
        values = [self._one_row(value, repeats, nodes) for value in values]
        whole = values[-1]
        starts: dict[int, sympy.Expr] = dict.fromkeys(grows, sympy.Integer(0))
        if not all(_begins_with(whole, value) for value in values):
            ending = next((a for a in grows if all(_ends_with(whole, v, a) for v in values)), None)
            if ending is None:
                same = self._same_up_to(values) if grows else None
                raise PortError(
                    [self._refusal(nodes[0], "a constant", longer=bool(grows), same=same)]
                )
            starts[ending] = whole.shape[ending] - sizes[ending]
        table = self.emitter.table(whole, nodes)
        for axis, start in starts.items():
            ends = [self.emitter.size(size) for size in (start, start + sizes[axis])]
            table = self.emitter.call(
                aten.slice.Tensor, (table, axis, *ends), {}, nodes, check=False
            )
        if repeats:
            shape = [self.emitter.size(size) for size in sizes]
            table = self.emitter.call(aten.expand.default, (table, shape), {}, nodes)
        return table

    def _one_row(
        self, value: torch.Tensor, axes: list[int], nodes: tuple[fx.Node, ...]
    ) -> torch.Tensor:
        for axis in axes:
            row = value.narrow(axis, 0, 1)
            if not _equal(row.expand_as(value), value):
                raise PortError([self._refusal(nodes[0], "a constant along the batch")])
            value = row
        return value

    def _same_up_to(self, values: list[torch.Tensor]) -> int | None:
        """The longest sample that, with all shorter ones, would have given one table."""
        lengths = [s.length for s in self.samples]
        for length in sorted(set(lengths), reverse=True)[1:]:
            known = [(n, v) for n, v in zip(lengths, values, strict=True) if n <= length]
            whole = next(v for n, v in known if n == length)
            if len({n for n, _ in known}) > 2 and all(_begins_with(whole, v) for _, v in known):
                return length
        return None

    def _refusal(
        self, node: fx.Node, what: str, *, longer: bool = False, same: int | None = None
    ) -> Reason:
        sizes = list(dict.fromkeys(f"{s.batch} x {s.length}" for s in self.samples))
        inputs = ", ".join(sizes if len(sizes) <= _NAMED else [*sizes[: _NAMED - 1], "..."])
        so = "is not the beginning of what longer sequences use" if longer else "differs"
        hint = "what is computed for a token must not depend on the number of tokens or rows"
        if same is not None:
            hint += f"; up to {same} tokens it does not: max_seq_len={same} takes these alone"
        return Reason(
            ReasonCode.DEPENDS_ON_LENGTH,
            f"{what} {so} between inputs of {inputs} tokens (rows x length)",
            next((at for n in (node, *node.users) if (at := user_location(n))), None),
            hint,
        )


def _part_taken(
    nodes: tuple[fx.Node, ...],
) -> tuple[tuple[fx.Node, ...], int, tuple[int, ...]] | None:
    """What ``table[:T]`` is cut from, the axis, and the sizes, where some samples do not cut.

    At plain sizes indexing leaves out what takes all, as it does at the length of the table.
    """
    cuts = [arguments(n) for n in nodes if n.target is aten.slice.Tensor]
    if not cuts or len(cuts) == len(nodes):
        return None
    dims = {cut["dim"] % len(shape_of(cut["self"])) for cut in cuts}
    if len(dims) > 1 or any(cut["start"] not in (0, None) or cut["step"] != 1 for cut in cuts):
        return None
    dim = dims.pop()
    if any(len(shape_of(n)) <= dim for n in nodes):
        return None
    is_view = (aten.slice.Tensor, aten.alias.default)
    wholes = tuple(n.args[0] if n.target in is_view else n for n in nodes)
    return wholes, dim, tuple(shape_of(n)[dim] for n in nodes)  # type: ignore[return-value]


def _begins_with(whole: torch.Tensor, part: torch.Tensor) -> bool:
    if whole.dim() != part.dim():
        return False
    for axis, size in enumerate(part.shape):
        if size > whole.shape[axis]:
            return False
        whole = whole.narrow(axis, 0, size)
    return _equal(whole, part)


def _ends_with(whole: torch.Tensor, part: torch.Tensor, axis: int) -> bool:
    """Whether `part` is the end of `whole` along one axis, and its beginning along the others."""
    if whole.dim() != part.dim() or part.shape[axis] > whole.shape[axis]:
        return False
    size = part.shape[axis]
    return _begins_with(whole.narrow(axis, whole.shape[axis] - size, size), part)


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Bitwise, but for the payload of NaN."""
    if one.is_floating_point() or one.is_complex():
        return torch.equal(one, other) or torch.allclose(
            one, other, rtol=0.0, atol=0.0, equal_nan=True
        )
    return torch.equal(one, other)
