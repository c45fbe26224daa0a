"""What happened to a graph, as rows: kept, changed, created, erased, replaced.

    with GraphDiff(gm) as diff:
        with diff.pass_("attention"):
            rewrite_attention(gm)
    print(diff.table())

Events come from the hooks of `fx.GraphModule`. Hooks do not see ``node.args = ...``,
``replace_input_with`` or a whole new graph: arguments of kept nodes are compared at the end, and
nodes that no hook announced are aligned (`fxport.diff.align`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from fxport.capture.location import user_location
from fxport.diff.align import align
from fxport.diff.names import (
    argument_text,
    arguments_text,
    module_near,
    node_text,
    sizes_of,
    stable_names,
    target_text,
    value_text,
)
from fxport.diff.snapshot import Snapshot
from fxport.errors import FxportError, Location
from fxport.report import Decision

if TYPE_CHECKING:
    from fxport.diff.check import Check

__all__ = ["Change", "GraphDiff", "NodeRecord", "Row"]


class Change(Enum):
    """What became of a node."""

    KEPT = "kept"
    CHANGED = "changed"  # the same operation with another argument
    CREATED = "created"
    ERASED = "erased"
    REPLACED = "replaced"


@dataclass(frozen=True)
class NodeRecord:
    """One node, in words.

    Attributes:
        key: stable name, see `fxport.diff.names`.
        op: the fx kind, e.g. ``"call_function"``.
        target: ``"aten.softmax.int"``; the qualified name of an input.
        arguments: positional and keyword arguments, nodes under their keys.
        value: dtype and shape of the result, ``"float32[B, T, 64]"``; "" where unknown.
        module: the user's module.
        location: the user's line.
        node: the node in `GraphDiff.before` or `GraphDiff.after`.
    """

    key: str
    op: str
    target: str
    arguments: str
    value: str
    module: str
    location: Location | None
    node: fx.Node = field(repr=False, compare=False)

    def __str__(self) -> str:
        return node_text(self.op, self.key, self.target, self.arguments)


@dataclass(frozen=True)
class Row:
    """One node before, what stands in its place after, and the pass that did it ("" if kept)."""

    change: Change
    before: NodeRecord | None
    after: NodeRecord | None
    made_by: str = ""


class GraphDiff:
    """Records how a graph changes inside the ``with`` block; several passes may be named.

    Args:
        gm: the graph module that passes change in place. Nested ones are not followed.
        name: the pass, where `pass_` names none.
        after: an earlier diff of `gm`, since which the graph has not changed; saves a copy.
    """

    def __init__(self, gm: fx.GraphModule, name: str = "", after: GraphDiff | None = None) -> None:
        self._earlier = None if after is None else after._after
        self._gm: fx.GraphModule = gm
        self._pass = name
        self._names: set[str] = set()
        self._made: dict[fx.Node, str] = {}
        self._gone: dict[fx.Node, str] = {}
        self._successor: dict[fx.Node, str] = {}
        self._before: Snapshot | None = None
        self._after: Snapshot | None = None
        self._rows: tuple[Row, ...] | None = None
        self._pairs: dict[fx.Node, fx.Node] | None = None
        self._decisions: list[Decision] = []

    @classmethod
    def between(
        cls,
        before: fx.GraphModule | fx.Graph,
        after: fx.GraphModule | fx.Graph,
        name: str = "",
        pairs: Mapping[fx.Node, fx.Node] | None = None,
    ) -> GraphDiff:
        """The diff of two graphs that nobody watched.

        Args:
            pairs: nodes of `before` -> what stands in their place, where that is known; see
                `fxport.diff.align` otherwise.
        """
        diff = cls.__new__(cls)
        GraphDiff.__init__(diff, fx.GraphModule({}, fx.Graph()), name)
        one, other = diff._before, diff._after = Snapshot(before), Snapshot(after)
        if pairs is None:
            diff._pairs = align(one.graph, other.graph)
        else:
            diff._pairs = {one.copies[a]: other.copies[b] for a, b in pairs.items()}
        return diff

    # --- recording ------------------------------------------------------------------------

    def __enter__(self) -> GraphDiff:
        if self._before is not None:
            raise FxportError("a GraphDiff records once; make another one")
        self._before = self._earlier or Snapshot(self._gm)
        self._gm._register_create_node_hook(self._on_create)
        self._gm._register_erase_node_hook(self._on_erase)
        self._gm._register_replace_node_hook(self._on_replace)
        return self

    def __exit__(self, *_: object) -> None:
        self._gm._unregister_create_node_hook(self._on_create)
        self._gm._unregister_erase_node_hook(self._on_erase)
        self._gm._unregister_replace_node_hook(self._on_replace)
        self._after = Snapshot(self._gm)
        self._pairs = self._recorded_pairs()

    @contextmanager
    def pass_(self, name: str) -> Iterator[None]:
        """Names the pass that runs inside."""
        self._names.add(name)
        outer, self._pass = self._pass, name
        try:
            yield
        finally:
            self._pass = outer

    def note(self, decisions: Iterable[Decision]) -> None:
        """What passes decided; shown at the nodes that it is about."""
        self._decisions.extend(decisions)

    def _on_create(self, node: fx.Node) -> None:
        self._made[node] = self._pass

    def _on_erase(self, node: fx.Node) -> None:
        self._gone[node] = self._pass

    def _on_replace(self, old: fx.Node, new: str, user: fx.Node) -> None:
        if user.name != new:  # the replacement itself may go on using what it replaces
            self._successor[old] = new

    def _recorded_pairs(self) -> dict[fx.Node, fx.Node]:
        before, after = self._snapshots()
        unannounced = after.copies.keys() - before.copies.keys() - self._made.keys()
        if unannounced:  # another graph was put in place
            return align(before.graph, after.graph)
        made = {n.name: n for n in (*before.copies, *self._made)}
        pairs: dict[fx.Node, fx.Node] = {}
        for node, copied in before.copies.items():
            last, seen = node, {node}
            while last not in after.copies or (last is node and not node.users):
                following = made.get(self._successor.get(last, ""))
                if following is None or following in seen:
                    break
                seen.add(following)
                last = following
            if last not in after.copies and node in after.copies:
                last = node
            if last in after.copies:
                pairs[copied] = after.copies[last]
        return pairs

    # --- reading --------------------------------------------------------------------------

    @property
    def before(self) -> fx.GraphModule:
        """The graph as it was, runnable."""
        return self._snapshots()[0].module

    @property
    def after(self) -> fx.GraphModule:
        """The graph as it became, runnable."""
        return self._snapshots()[1].module

    @property
    def rows(self) -> tuple[Row, ...]:
        """Every node of both graphs, in the order of the graph after; made on first use."""
        if self._rows is None:
            self._rows = self._make_rows()
        return self._rows

    @property
    def decisions(self) -> tuple[Decision, ...]:
        """What the passes said they decided."""
        return tuple(self._decisions)

    @property
    def changes(self) -> tuple[Row, ...]:
        """The rows that are not kept."""
        return tuple(r for r in self.rows if r.change is not Change.KEPT)

    def __bool__(self) -> bool:
        """Whether anything changed."""
        return bool(self.changes)

    def _snapshots(self) -> tuple[Snapshot, Snapshot]:
        if self._before is None or self._after is None:
            raise FxportError("the diff is complete only after its `with` block")
        return self._before, self._after

    def _make_rows(self) -> tuple[Row, ...]:
        before, after = self._snapshots()
        pairs = self._pairs or {}
        # What no hook saw was done by the only pass there was, or nobody knows by which.
        unseen = next(iter(self._names)) if len(self._names) == 1 else self._pass
        old, new = _records(before.graph), _records(after.graph)
        originals = {copied: node for node, copied in before.copies.items()}
        makers = {after.copies[n]: name for n, name in self._made.items() if n in after.copies}
        same = {copied: after.copies[n] for n, copied in before.copies.items() if n in after.copies}
        partners: dict[fx.Node, list[fx.Node]] = {}
        for one, other in pairs.items():
            partners.setdefault(other, []).append(one)
        rows: list[Row] = []
        for node in after.graph.nodes:
            olds = partners.get(node, [])
            for one in olds:
                kept = same.get(one) is node or (not same and _same_op(one, node))
                change = Change.REPLACED
                if kept and _same_op(one, node):
                    change = Change.KEPT if _same_arguments(one, node, pairs) else Change.CHANGED
                by = "" if change is Change.KEPT else makers.get(node, "")
                if not by and change is not Change.KEPT:
                    by = self._gone.get(originals[one], unseen)
                rows.append(Row(change, old[one], new[node], by))
            if not olds:
                rows.append(Row(Change.CREATED, None, new[node], makers.get(node, unseen)))
        return _with_erased(rows, before.graph, pairs, old, originals, self._gone, unseen)

    # --- numbers --------------------------------------------------------------------------

    def check(
        self,
        *inputs: Any,
        atol: float | None = None,
        rtol: float | None = None,
        grads: bool = True,
        dtype: torch.dtype | None = torch.float64,
        given: Mapping[str, torch.Tensor] | None = None,
    ) -> Check:
        """Runs both graphs on the same inputs; compares at every pair of nodes and the outputs.

        ``check(tokens).first`` names the first node that diverges, with the user's line.

        Args:
            inputs: one value per placeholder, or one per DATA placeholder of a captured graph.
            atol, rtol: tolerances; by default those of the dtype computed in.
            grads: compare gradients too.
            dtype: compute in this dtype, casts inside the graphs included; None: in their own.
            given: further inputs by (qualified) name: parameters without a value, `positions`.

        Raises:
            FxportError: an input is missing, or a graph draws random numbers.
        """
        from fxport.diff.check import check_pairs

        pairs = [(r.before.node, r.after.node) for r in self.rows if r.before and r.after]
        return check_pairs(
            self.before,
            self.after,
            pairs,
            *inputs,
            atol=atol,
            rtol=rtol,
            grads=grads,
            dtype=dtype,
            given=given,
        )

    # --- rendering ------------------------------------------------------------------------

    def table(self) -> str:
        """For terminals of 80 columns; only what changed, identical layers folded."""
        from fxport.diff.render_text import table

        return table(self)

    def text(self) -> str:
        """Unified diff over stable names; "" when nothing changed."""
        from fxport.diff.render_text import unified

        return unified(self)

    def to_dict(self) -> dict[str, Any]:
        """Schema: see `fxport.diff.render_text.as_dict`."""
        from fxport.diff.render_text import as_dict

        return as_dict(self)

    def to_json(self, path: str | Path) -> None:
        """Writes `to_dict`."""
        import json

        Path(path).write_text(json.dumps(self.to_dict(), indent=1), encoding="utf-8")

    def to_html(self, path: str | Path) -> None:
        """Writes one self-contained page."""
        from fxport.diff.render_html import page

        Path(path).write_text(page(self), encoding="utf-8")

    def __str__(self) -> str:
        return self.table()


def _with_erased(
    rows: list[Row],
    graph: fx.Graph,
    pairs: dict[fx.Node, fx.Node],
    old: dict[fx.Node, NodeRecord],
    originals: dict[fx.Node, fx.Node],
    gone: dict[fx.Node, str],
    default: str,
) -> tuple[Row, ...]:
    """The rows with every erased node put after the row of the node that preceded it."""
    follow: dict[fx.Node | None, list[Row]] = {}
    previous: fx.Node | None = None
    for node in graph.nodes:
        if node in pairs:
            previous = node
        else:
            by = gone.get(originals[node], default)
            follow.setdefault(previous, []).append(Row(Change.ERASED, old[node], None, by))
    merged = follow.pop(None, [])
    for row in rows:
        merged.append(row)
        if row.before is not None:
            merged.extend(follow.pop(row.before.node, []))
    return tuple(merged)


def _same_op(one: fx.Node, other: fx.Node) -> bool:
    return one.op == other.op and (one.op != "call_function" or one.target == other.target)


def _same_arguments(one: fx.Node, other: fx.Node, pairs: dict[fx.Node, fx.Node]) -> bool:
    """Equal but for nodes, which must correspond."""
    if one.target != other.target and one.op == "call_function":
        return False
    numbers: dict[fx.Node, str] = {}
    for node in one.all_input_nodes:
        partner = pairs.get(node)
        if partner is None:
            return False
        numbers[node] = partner.name
    theirs = {n: n.name for n in other.all_input_nodes}
    mine = argument_text(one.args, numbers) + argument_text(one.kwargs, numbers)
    return mine == argument_text(other.args, theirs) + argument_text(other.kwargs, theirs)


def _records(graph: fx.Graph) -> dict[fx.Node, NodeRecord]:
    names, sizes = stable_names(graph), sizes_of(graph)
    modules: dict[fx.Node, str] = {}
    return {
        node: NodeRecord(
            key=names[node],
            op=node.op,
            target=target_text(node),
            arguments=arguments_text(node, names, sizes),
            value=value_text(node.meta.get("val"), sizes),
            module=module_near(node, modules),
            location=user_location(node),
            node=node,
        )
        for node in graph.nodes
    }
