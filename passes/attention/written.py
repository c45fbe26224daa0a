"""Masks that the code writes piece by piece, as what they hold in the end.

Before                                      After
    m = zeros([4, 4])                           m = get_attr     what was written: [4, 4]
    fill_(slice(select(m, 0, 0), 0, 1), -inf)
    fill_(slice(select(m, 0, 1), 0, 2), -inf)
    ..
    s + m                                       s + m

    m = ones([T, T])                            m = ones([T, T])
    fill_(slice(m, 1, 0, 2), 0.0)               w = fill(slice(m, 1, 0, 2), 0.0)
    s + m                                       s + slice_scatter(m, w, 1, 0, 2)

Only what no input, parameter or buffer enters: the values are those that the code would write, and
nothing has a gradient. Where all sizes are numbers the code runs here, once; else each write makes
the tensor anew, unless there are many.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from fxport.capture.arguments import arguments, shape_of
from fxport.capture.memory import Memory, is_fresh, is_mutation
from fxport.passes.attention.emit import Emitter
from fxport.passes.graph_facts import computes, is_random, reachable, value_inputs
from fxport.passes.masks.prover import MAX_ENTRIES
from fxport.passes.masks.values import constant_value

__all__ = ["hold_what_is_written"]

aten = torch.ops.aten

_MAX_MADE_ANEW = 16  # each copies the whole tensor


@dataclass(frozen=True)
class _Written:
    """A fresh tensor and everything up to the last write into it.

    Attributes:
        base: makes it.
        steps: views of it and writes into it, in order.
    """

    base: fx.Node
    steps: tuple[fx.Node, ...]


def hold_what_is_written(gm: fx.GraphModule) -> None:
    """Rewrites the graph in place."""
    # One may have been written into another.
    while any(is_mutation(n) for n in gm.graph.nodes) and _hold_once(gm):
        pass


def _hold_once(gm: fx.GraphModule) -> bool:
    """Whether there was anything to replace."""
    changed = False
    for written in _constants(gm):
        value = _run(written)
        if value is not None:
            _hold(gm, written, value)
            changed = True
        elif sum(map(is_mutation, written.steps)) <= _MAX_MADE_ANEW:
            changed = _make_anew(gm, written) or changed
    return changed


def _constants(gm: fx.GraphModule) -> list[_Written]:
    """Tensors that nothing but constants are written into, and nobody reads before the end."""
    memory = Memory(gm.graph)
    groups: dict[fx.Node, list[fx.Node]] = {}
    for node in gm.graph.nodes:
        groups.setdefault(memory.shared(node), []).append(node)
    found = []
    for base, *views in groups.values():
        writes = memory.written_by(base)
        if not writes or not is_fresh(base) or not isinstance(base.meta.get("val"), FakeTensor):
            continue
        last = writes[-1]
        steps = [n for n in (*views, *writes) if not last < n]
        written = _Written(base, tuple(sorted(set(steps))))
        if _is_constant(memory, written) and _is_closed(written):
            found.append(written)
    return found


def _is_constant(memory: Memory, written: _Written) -> bool:
    own = {written.base, *written.steps}
    behind = reachable(own, value_inputs)
    plain = all(n in own or computes(n) for n in behind) and not any(map(is_random, own))
    return plain and not any(memory.written_by(n) for n in behind if n not in own)


def _is_closed(written: _Written) -> bool:
    """Whether only the tensor itself is read, when all is written."""
    last, inside = written.steps[-1], set(written.steps)
    early = {u for u in written.base.users if not last < u}
    users = early | {u for n in written.steps for u in n.users}
    return users <= inside


def _run(written: _Written) -> torch.Tensor | None:
    """What the tensor holds in the end; None where a size is not known here."""
    nodes = (written.base, *written.steps)
    shapes = [shape_of(n) for n in nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    if not all(isinstance(size, int) for shape in shapes for size in shape):
        return None
    if written.base.meta["val"].numel() > MAX_ENTRIES:
        return None
    values: dict[fx.Node, Any] = {}
    try:
        for node in nodes:
            _compute(node, values)
    except (ValueError, RuntimeError, IndexError):
        return None
    result: torch.Tensor = values[written.base]
    return result


def _compute(node: fx.Node, values: dict[fx.Node, Any]) -> None:
    for given in node.all_input_nodes:
        if given not in values:
            constant_value(given, {}, values)
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: values[n])
    with _disable_current_modes(), torch.no_grad():
        values[node] = node.target(*args, **kwargs)  # type: ignore[operator]


def _hold(gm: fx.GraphModule, written: _Written, value: torch.Tensor) -> None:
    held = Emitter(gm, written.base, []).constant("written", value)
    _read_instead(gm, written, held)
    gm.graph.erase_node(written.base)


def _read_instead(gm: fx.GraphModule, written: _Written, new: fx.Node) -> None:
    """Whatever reads the tensor in the end reads `new`; nothing is written any more."""
    last = written.steps[-1]
    for user in [u for u in written.base.users if last < u]:
        user.replace_input_with(written.base, new)
    for node in reversed(written.steps):
        gm.graph.erase_node(node)


# -- for sizes that are not known ------------------------------------------------------------------


_SCATTERS: dict[Any, Any] = {
    aten.slice.Tensor: aten.slice_scatter.default,
    aten.select.int: aten.select_scatter.default,
}


def _make_anew(gm: fx.GraphModule, written: _Written) -> bool:
    """Every write as a new tensor; nothing happens where one cannot be."""
    emitter = Emitter(gm, written.steps[-1], [])
    current = written.base
    for write in (n for n in written.steps if is_mutation(n)):
        new = _after(emitter, written.base, current, write)
        if new is None:
            emitter.undo()
            return False
        current = new
    _read_instead(gm, written, current)
    return True


def _after(emitter: Emitter, base: fx.Node, current: fx.Node, write: fx.Node) -> fx.Node | None:
    """What the tensor holds after a write of one number into a part of it."""
    view = arguments(write)["self"]
    views: list[fx.Node] = []
    while view is not base:
        if view.target not in _SCATTERS:
            return None
        views.insert(0, view)
        view = view.args[0]
    parts = [current]
    for view in views:
        part = emitter.call(view.target, parts[-1], *view.args[1:], **view.kwargs)  # type: ignore[arg-type]
        parts.append(part)
    new = _filled(emitter, write, parts[-1])
    for view, whole in zip(reversed(views), reversed(parts[:-1]), strict=True):
        if new is None:
            return None
        scatter = _SCATTERS[view.target]
        new = emitter.call(scatter, whole, new, *view.args[1:], **view.kwargs)
    return new


def _filled(emitter: Emitter, write: fx.Node, part: fx.Node) -> fx.Node | None:
    """A part that is all one number now, in its own dtype."""
    value = arguments(write).get("src" if write.target is aten.copy_.default else "value")
    if write.target not in _FILLS or value is None:
        return None
    if isinstance(value, fx.Node):
        if value.meta["val"].dim() or value.meta["val"].device != part.meta["val"].device:
            return None
        return emitter.call(aten.fill.Tensor, part, value)
    return emitter.call(aten.fill.Scalar, part, value)


_FILLS = {aten.copy_.default, aten.fill_.Tensor, aten.fill_.Scalar}
