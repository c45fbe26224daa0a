"""Inductor, with its own attention fusion switched off.

Inductor matches 136 fixed shapes of attention, and some of them wrongly: in torch 2.13
``softmax(q @ k.permute(0, 2, 3, 1) * s) @ v`` with B = 1, H = T becomes another function. What we
could rewrite is rewritten before Inductor sees it; what we declined must stay as it was.

Its patterns share one table with others that matter (cross entropy's backward would store a
one-hot ``[B * T, V]`` without them), and the table has no switch per pattern. All of the attention
patterns contain ``aten.exp``, so ``exp`` goes by another name while the table is searched::

    joint_custom_pre_pass        patterns                 joint_custom_post_pass
    aten.exp -> fxport::exp      no attention is found    fxport::exp -> aten.exp
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._dynamo.source import SyntheticLocalSource
from torch._inductor import config
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

__all__ = ["check_options", "compile_with_inductor"]

_library = torch.library.Library("fxport", "FRAGMENT")
_library.define("exp(Tensor x) -> Tensor")
_library.impl("exp", torch.exp, "CompositeExplicitAutograd")


class _Rename(CustomGraphPass):
    """Renames all calls of one op, around the passes that the user configured."""

    def __init__(self, old: Any, new: Any, *, before: Sequence[Any], after: Sequence[Any]) -> None:
        self._old, self._new = old, new
        self._before, self._after = before, after

    def __call__(self, graph: fx.Graph) -> None:
        for user_pass in self._before:
            user_pass(graph)
        for node in graph.find_nodes(op="call_function", target=self._old, sort=False):
            node.target = self._new
        for user_pass in self._after:
            user_pass(graph)

    def uuid(self) -> Any:
        passes = (*self._before, *self._after)
        theirs = [p.uuid() if isinstance(p, CustomGraphPass) else None for p in passes]
        if None in theirs:
            return None  # Inductor cannot tell one plain function from another: no caching
        return (get_hash_for_files((__file__,)), str(self._old), *map(str, theirs))


def check_options(options: Mapping[str, Any]) -> None:
    """Raises ValueError for a name that is not an option of Inductor."""
    unknown = sorted(set(options) - set(config.get_config_copy()))
    if unknown:
        raise ValueError(f"options['inductor']: Inductor has no option {', '.join(unknown)}")


def _name_constants(gm: fx.GraphModule) -> None:
    """AOTAutograd asks where Dynamo has each tensor of the module from; ours come from nowhere.

    Such are tensors that lowering made of Python values (``x[:, [-1]]``) and proven masks (slopes).
    """
    known = getattr(gm, "_param_name_to_source", None)
    if known is None:
        return
    parameters = gm.named_parameters(remove_duplicate=False)
    names = [n for n, _ in (*parameters, *gm.named_buffers(remove_duplicate=False))]
    made = {name: SyntheticLocalSource(f"fxport.{name}") for name in names if name not in known}
    vars(gm)["_param_name_to_source"] = {**known, **made}


def compile_with_inductor(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: Mapping[str, Any]
) -> Callable[..., Any]:
    """Compiles a graph for training or inference. Takes ownership of `gm`.

    Args:
        gm: pre-dispatch ATen or Dynamo's own graph.
        example_inputs: one value per placeholder.
        options: Inductor's configuration, by its names.
    """
    _name_constants(gm)
    with config.patch(dict(options)):
        before = _as_list(config.joint_custom_pre_pass)
        after = _as_list(config.joint_custom_post_pass)
    exp, hidden = torch.ops.aten.exp.default, torch.ops.fxport.exp.default
    patches = {
        **options,
        "joint_custom_pre_pass": _Rename(exp, hidden, before=before, after=()),
        "joint_custom_post_pass": _Rename(hidden, exp, before=(), after=after),
    }
    compiled = compile_fx(gm, example_inputs, config_patches=patches)
    assert callable(compiled)  # other results are for ahead-of-time compilation
    _let_go(compiled)
    return compiled


# What AOTAutograd hangs on its result "for convenience": methods of the graph module.
_CONVENIENCES = ("zero_grad", "named_parameters", "named_buffers")


def _let_go(compiled: Callable[..., Any]) -> None:
    """The graph is not needed any more; ours holds, beside itself, all nodes erased from it."""
    function: Any = compiled
    while function is not None:
        held = vars(function)
        for name in _CONVENIENCES:
            held.pop(name, None)
        function = held.get("__wrapped__")


def _as_list(configured: Any) -> list[Any]:
    if configured is None:
        return []
    return list(configured) if isinstance(configured, list | tuple) else [configured]
