"""What Dynamo records of ``torch.vmap``, run at once: the mapped dimension is one like any other.

Before                                          After
    _vmap_increment_nesting(4, "error")             y = transpose(k, 1, 2)
    a = _add_batch_dim(q, 0, 1)     [T, D]          s = bmm(q, y)               [4, T, T]
    b = _add_batch_dim(k, 0, 1)                     p = _softmax(s, 2, False)
    p = (a @ b.mT).softmax(-1)
    r = _remove_batch_dim(p, 1, 4, 0)
    _vmap_decrement_nesting()

torch's own batching rules say what becomes of every call. They lie below autograd, so a part that
switches gradients, or has a derivative of its own, stays as it is; so does one that draws random
numbers, or writes in place (as the making of a BlockMask does).
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._ops import HigherOrderOperator
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.fx.traceback import set_current_meta

__all__ = ["VmapRegion", "vmap_regions"]

_predispatch = torch._functorch.predispatch
_ENTERS, _LEAVES = _predispatch._vmap_increment_nesting, _predispatch._vmap_decrement_nesting
_KNOWN = {
    _ENTERS,
    _LEAVES,
    _predispatch._add_batch_dim,
    _predispatch._remove_batch_dim,
    _predispatch.lazy_load_decompositions,
}


@dataclass(frozen=True)
class VmapRegion:
    """The calls from the outermost entry to its end.

    Attributes:
        inputs: what they take from before.
        results: those of them that are used afterwards.
    """

    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    results: tuple[fx.Node, ...]

    def __call__(self, inputs: list[Any]) -> tuple[Any, ...]:
        """Runs them."""
        env = dict(zip(self.inputs, inputs, strict=True))
        depth = 0
        try:
            for node in self.nodes:
                with set_current_meta(node):
                    env[node] = _run(node, env)
                depth += (node.target is _ENTERS) - (node.target is _LEAVES)
        finally:
            for _ in range(depth):
                _LEAVES()
        return tuple(env[node] for node in self.results)


def vmap_regions(graph: fx.Graph) -> Iterator[VmapRegion]:
    """Those of a graph of Dynamo that can be run at once."""
    found: list[fx.Node] = []
    depth = 0
    for node in graph.nodes:
        depth += node.target is _ENTERS
        if depth:
            found.append(node)
        depth -= node.target is _LEAVES
        if found and not depth:
            if all(map(_is_plain, found)):
                yield _region(found)
            found = []


def _region(nodes: list[fx.Node]) -> VmapRegion:
    inside = set(nodes)
    inputs = dict.fromkeys(n for node in nodes for n in node.all_input_nodes if n not in inside)
    results = [n for n in nodes if not set(n.users) <= inside]
    return VmapRegion(tuple(nodes), tuple(inputs), tuple(results))


def _is_plain(node: fx.Node) -> bool:
    if node.target is _ENTERS:
        return len(node.args) > 1 and node.args[1] == "error"  # what draws random numbers raises
    if _writes(node.target):
        return False
    if node.op == "call_method":
        return True
    module = getattr(node.target, "__module__", None) or ""
    transforms = "functorch" in module and node.target not in _KNOWN
    switches = node.target in (torch._C._set_grad_enabled, _enter_autocast, _exit_autocast)
    whole = isinstance(node.target, HigherOrderOperator)
    return node.op == "call_function" and not (transforms or switches or whole)


def _writes(target: Any) -> bool:
    """``x[i] = y``, ``x.add_(y)``; not ``operator.and_``."""
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    plain = getattr(target, "__module__", None) == "_operator"
    in_place = name.endswith("_") and not name.endswith("__") and not plain
    return target is operator.setitem or in_place


def _run(node: fx.Node, env: dict[fx.Node, Any]) -> Any:
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), env.__getitem__)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)
