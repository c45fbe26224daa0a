"""Where forward's gradient is another than that of the operations that a trace sees.

Before                                  After
    with torch.no_grad():                   y = relu(x)
        y = relu(x)                         z = detach(y) + x
    z = y + x

`torch.no_grad` is kept as a `detach` of what leaves it. What no graph of operations can hold
(`torch.autograd.Function`, hooks, a forward that asks whether gradients are taken) is noted: what
is made of the graph must then not be trained.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any
from unittest.mock import patch

import sympy
import torch
import torch.fx.traceback as fx_traceback
import torch.utils.checkpoint
from torch import fx, nn
from torch.overrides import TorchFunctionMode

from fxport.capture.arguments import shape_of
from fxport.capture.inputs import InputKind, graph_input
from fxport.capture.location import line_of_user, user_location
from fxport.capture.memory import is_mutation
from fxport.errors import Location, Reason, ReasonCode

__all__ = [
    "as_called",
    "let_gradients_pass",
    "note_view_of_parameter",
    "stop_gradients",
    "watch_gradients",
    "without_gradients",
]

aten = torch.ops.aten
NO_GRAD = "fxport_no_grad"
_MAXIMA = (aten.amax.default, aten.max.dim, aten.max.default)
_HINT = "train the model itself: torch.compile(model, backend='vllm_generic') keeps it"
_CHECKPOINT = inspect.getsourcefile(torch.utils.checkpoint)
_HOOKS = ("_backward_hooks", "_backward_pre_hooks")
_PARAMETER_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")


class _Watch:
    """Of one capture.

    Attributes:
        enabled: whether forward's own code takes gradients at this point.
        found: why the graph has another gradient, by message and line.
    """

    def __init__(self) -> None:
        self.enabled = True
        self.found: dict[tuple[str, Location | None], Reason] = {}

    def note(self, message: str, where: Location | None) -> None:
        reason = Reason(ReasonCode.GRADIENT_DIFFERS, message, where, _HINT)
        self.found.setdefault((message, where), reason)


_WATCH: ContextVar[_Watch | None] = ContextVar("watch", default=None)


@contextmanager
def watch_gradients(model: nn.Module) -> Iterator[list[Reason]]:
    """For the traces of a model; the list has all that was noted when this ends."""
    watch, reasons = _Watch(), list[Reason]()
    _note_hooks(watch, model)
    token = _WATCH.set(watch)
    with ExitStack() as patches:
        for region in (torch.no_grad, torch.enable_grad, torch.inference_mode):
            patches.enter_context(patch.object(region, "__enter__", _entering(watch, region)))
            patches.enter_context(patch.object(region, "__exit__", _leaving(watch, region)))
        for name, wrapped in _switching(watch).items():
            patches.enter_context(patch.object(torch.set_grad_enabled, name, wrapped))
        apply = classmethod(_applying(watch))
        patches.enter_context(patch.object(torch.autograd.Function, "apply", apply))
        patches.enter_context(patch.object(torch, "is_grad_enabled", _asking(watch)))
        patches.enter_context(_Notes(watch))
        try:
            yield reasons
        finally:
            _WATCH.reset(token)
            reasons += watch.found.values()


@contextmanager
def as_called() -> Iterator[None]:
    """For one call of forward, as a training step makes it: with gradients."""
    watch = _WATCH.get()
    if watch is None:
        yield
        return
    before, watch.enabled = watch.enabled, True
    try:
        yield
    finally:
        watch.enabled = before


class _Notes(TorchFunctionMode):
    """Marks what is traced under `torch.no_grad`, and notes questions about gradients."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in _QUESTIONS:
            where = line_of_user(sys._getframe(1), alone=True)
            if where is not None:
                message = f"forward uses `{_QUESTIONS[func]}`, which a trace cannot answer"
                self._watch.note(message, where)
        if self._watch.enabled:
            return func(*args, **(kwargs or {}))
        with fx_traceback.annotate({NO_GRAD: True}):
            return func(*args, **(kwargs or {}))


_QUESTIONS: dict[Any, str] = {
    torch.Tensor.requires_grad.__get__: "Tensor.requires_grad",  # type: ignore[attr-defined]
    torch.Tensor.register_hook: "Tensor.register_hook",
    torch.Tensor.retain_grad: "Tensor.retain_grad",
}


def _note_hooks(watch: _Watch, model: nn.Module) -> None:
    for name, module in model.named_modules():
        if any(getattr(module, hooks, None) for hooks in _HOOKS):
            watch.note(f"`{name}` has a backward hook" if name else "it has a backward hook", None)
    for name, parameter in model.named_parameters():
        if any(getattr(parameter, hooks, None) for hooks in _PARAMETER_HOOKS):
            watch.note(f"the parameter `{name}` has a hook on its gradient", None)


def _entering(watch: _Watch, region: Any) -> Callable[..., Any]:
    original = region.__enter__

    @functools.wraps(original)
    def enter(self: Any) -> Any:
        before = self._fxport_before = watch.enabled
        result = original(self)
        if sys._getframe(1).f_code.co_filename == _CHECKPOINT:  # to keep nothing, not to learn none
            watch.enabled = before
            return result
        mode = getattr(self, "mode", False)  # of inference_mode
        watch.enabled = watch.enabled and not mode if region is torch.inference_mode else (
            region is torch.enable_grad
        )  # fmt: skip
        return result

    return enter


def _leaving(watch: _Watch, region: Any) -> Callable[..., Any]:
    original = region.__exit__

    @functools.wraps(original)
    def leave(self: Any, *error: Any) -> Any:
        result = original(self, *error)
        watch.enabled = self._fxport_before
        return result

    return leave


def _switching(watch: _Watch) -> dict[str, Callable[..., Any]]:
    """`torch.set_grad_enabled` switches when it is made, and back as a region or a decorator."""
    cls = torch.set_grad_enabled
    make, enter, leave, decorate = cls.__init__, cls.__enter__, cls.__exit__, cls.__call__

    def init(self: Any, mode: bool) -> None:
        self._fxport_before = watch.enabled
        make(self, mode)
        watch.enabled = mode

    def entering(self: Any) -> None:
        enter(self)
        watch.enabled = self.mode

    def leaving(self: Any, *error: Any) -> None:
        leave(self, *error)
        watch.enabled = self._fxport_before

    def called(self: Any, function: Any) -> Any:
        watch.enabled = self._fxport_before
        return decorate(self, function)

    return {"__init__": init, "__enter__": entering, "__exit__": leaving, "__call__": called}


def _applying(watch: _Watch) -> Callable[..., Any]:
    original = torch.autograd.Function.__dict__["apply"].__func__

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if not cls.__module__.startswith(("torch.utils.checkpoint", "fxport.")):
            where = line_of_user(sys._getframe(1))
            watch.note(f"`{cls.__name__}` has a backward of its own (autograd.Function)", where)
        return original(cls, *args, **kwargs)

    return apply


def _asking(watch: _Watch) -> Callable[[], bool]:
    original = torch.is_grad_enabled

    def is_grad_enabled() -> bool:
        where = line_of_user(sys._getframe(1), alone=True)
        if where is not None:
            watch.note("forward asks `torch.is_grad_enabled()`", where)
        return original()

    return is_grad_enabled


def stop_gradients(gm: fx.GraphModule) -> None:
    """Detaches, in place, what was computed under `torch.no_grad` and is used outside of it."""
    inside = {n for n in gm.graph.nodes if without_gradients(n)}
    watch, learned = _WATCH.get(), _learned(gm.graph)
    for node in list(gm.graph.nodes):
        if node not in learned or node not in inside or not _is_floating(node):
            continue
        if watch is not None and _changes_from_outside(node, inside):
            watch.note("a value is changed in place past its gradient", user_location(node))
        outside = [user for user in node.users if user not in inside]
        if outside:
            with gm.graph.inserting_after(node):
                stopped = gm.graph.call_function(aten.detach.default, (node,))
            stopped.meta = dict(node.meta)
            for user in outside:
                user.replace_input_with(node, stopped)
    gm.recompile()


def note_view_of_parameter(name: str, parameter: str) -> None:
    """For a constant of the trace that is a parameter, in another shape than its own."""
    watch = _WATCH.get()
    if watch is not None:
        message = f"`{name}` is a view of the parameter `{parameter}`, made before forward"
        watch.note(message, None)


def let_gradients_pass(gm: fx.GraphModule, length: sympy.Expr) -> tuple[Reason, ...]:
    """Takes out, in place, what only stops gradients within an attention, and says that it did.

    For what is served: an attention whose weights are computed under `torch.no_grad`, or whose
    scores or weights ``[.., T, T]`` are detached, is one.
    """
    found: dict[Location | None, Reason] = {}
    learned = _learned(gm.graph)
    for node in list(gm.graph.nodes):
        if node.target is not aten.detach.default:
            continue
        square = sum(size == length for size in shape_of(node)) > 1
        if not without_gradients(node) and not (
            square and node in learned and not _for_maxima(node)
        ):
            continue
        where = user_location(node)
        message = (
            "a part of forward runs under `torch.no_grad`"
            if without_gradients(node)
            else "`detach` stops the gradient of attention scores or weights"
        )
        found[where] = Reason(ReasonCode.GRADIENT_DIFFERS, message, where, _HINT)
        node.replace_all_uses_with(node.args[0])
        gm.graph.erase_node(node)
    gm.recompile()
    return tuple(found.values())


def _for_maxima(node: fx.Node) -> bool:
    """Subtracted from scores, a maximum changes no softmax: its gradient does not count."""
    return all(user.target in _MAXIMA for user in node.users)


def _learned(graph: fx.Graph) -> set[fx.Node]:
    """What parameters enter."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        given = node.op == "placeholder" and graph_input(node).kind is InputKind.PARAMETER
        if given or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def without_gradients(node: fx.Node) -> bool:
    """Whether it was traced under `torch.no_grad`."""
    return NO_GRAD in node.meta.get("custom", {})


def _is_floating(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())


def _changes_from_outside(node: fx.Node, inside: set[fx.Node]) -> bool:
    """Whether the op writes into what has a gradient: the old one goes on, past the change."""
    written = node.args[0] if node.args else None
    if not isinstance(written, fx.Node) or written.op == "placeholder":
        return False
    return is_mutation(node) and written not in inside
