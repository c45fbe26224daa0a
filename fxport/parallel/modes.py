"""Whether a model computes the same in training mode as in eval mode, which is what is captured."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import sympy
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from fxport.capture.batches import asked_about
from fxport.capture.checkpoints import under_checkpoint
from fxport.capture.clone import clone_for_capture, take_modes
from fxport.capture.export import ready
from fxport.capture.questions import first_change
from fxport.capture.state import State
from fxport.passes.tensor_parallel.computations import value_of

__all__ = [
    "CHECKPOINTS_DIFFER",
    "in_eval_mode",
    "in_training_mode",
    "same_at_every_size",
    "training_differs",
]

_BATCH, _LENGTH = 2, 5
_BOTH = (DimDynamic.DYNAMIC, DimDynamic.DYNAMIC)
CHECKPOINTS_DIFFER = "the model keeps other activations (torch.utils.checkpoint)"


def in_training_mode(model: nn.Module) -> nn.Module:
    """A copy in training mode that shares the tensors; the model itself if it is in it."""
    return model if model.training else clone_for_capture(model).train()


def in_eval_mode(model: nn.Module) -> nn.Module:
    """The model, or a clone of it, with every module in eval mode."""
    training = any(module.training for module in model.modules())
    return clone_for_capture(model).eval() if training else model


def same_at_every_size(model: nn.Module, longest: int | None) -> bool:
    """Whether forward, in the modes that it is in, asks nothing about sizes of up to `longest`."""
    clone = clone_for_capture(model)
    ready(clone)
    take_modes(clone, model)
    heard = asked_about(clone, _LENGTH, _BOTH)
    questions = [question.asked for question in heard.questions]
    as_a_number = sympy.Eq(heard.tokens, 1)  # nobody sees what is asked of that
    about_rows = any(heard.rows in asked.free_symbols for asked in questions)
    if not heard.whole or about_rows or as_a_number in questions:
        return False
    change = first_change(questions, heard.tokens, 2, longest)
    return change is None or (longest is not None and change >= longest)


def training_differs(model: nn.Module) -> str | None:
    """What runs in training mode and not in eval mode, in words; None when nothing does.

    Compares the operations of both, by shapes alone, at one length.

    Raises:
        GuardOnDataDependentSymNode, DataDependentOutputException: shapes are not enough.
    """
    clone = clone_for_capture(model)
    ready(clone)  # what is captured
    take_modes(clone, model)
    training = _operations(clone)
    evaluating = _operations(clone.eval())
    if training.names != evaluating.names:
        extra = [name for name in dict.fromkeys(training.names) if name not in evaluating.names]
    elif training.given != evaluating.given:  # batch_norm(.., training=True, ..)
        pairs = zip(training.names, training.given, evaluating.given, strict=True)
        first = next(name for name, one, other in pairs if one != other)
        return f"the model runs {first} on something else"
    elif training.checkpointed != evaluating.checkpointed:
        return CHECKPOINTS_DIFFER
    else:
        return None
    return f"the model runs {', '.join(extra)}" if extra else "the model takes another path"


class _Record(TorchDispatchMode):
    """Every operation, and what it is given: earlier results by their number, tensors of the model
    by their name, all else by value."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names: list[str] = []
        self.given: list[Hashable] = []
        self.checkpointed: list[bool] = []
        tensors = (*model.named_parameters(), *model.named_buffers())
        self._known: dict[int, Hashable] = {id(tensor): name for name, tensor in tensors}
        self._kept: list[Any] = []  # else another tensor may get the id of one that is gone

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":  # questions about a tensor, not computations
            return func(*args, **kwargs)
        self.names.append(str(func))
        self.given.append(self._said((args, sorted(kwargs.items()))))
        self.checkpointed.append(under_checkpoint())
        result = func(*args, **kwargs)
        for place, tensor in enumerate(tree_leaves(result)):
            self._known[id(tensor)] = (len(self.names), place)
            self._kept.append(tensor)
        return result

    def _said(self, value: Any) -> Hashable:
        if isinstance(value, list | tuple):
            return tuple(map(self._said, value))
        if not isinstance(value, Tensor):
            return repr(value)
        if id(value) in self._known:
            return self._known[id(value)]
        if isinstance(value, FakeTensor):
            return ("tokens", tuple(map(str, value.shape)))
        with _disable_current_modes():
            return value_of(value)


def _operations(model: nn.Module) -> _Record:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    state, record = State(model), _Record(model)
    # sizes that depend on data, such as how many tokens an expert gets, are symbols
    fake = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv(), static_shapes=True)
    with fake, record, torch.no_grad():
        model(torch.zeros(_BATCH, _LENGTH, dtype=torch.long, device=device))
    state.restore()
    return record
