"""Whether a model computes the same in training mode as in eval mode, which is what is captured."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode

from fxport.capture.checkpoints import under_checkpoint
from fxport.capture.clone import clone_for_capture, off_meta
from fxport.capture.state import State

__all__ = ["CHECKPOINTS_DIFFER", "in_training_mode", "training_differs"]

_BATCH, _LENGTH = 2, 5
CHECKPOINTS_DIFFER = "the model keeps other activations (torch.utils.checkpoint)"


def in_training_mode(model: nn.Module) -> nn.Module:
    """A copy in training mode that shares the tensors; the model itself if it is in it."""
    return model if model.training else clone_for_capture(model).train()


def training_differs(model: nn.Module) -> str | None:
    """What runs in training mode and not in eval mode, in words; None when nothing does.

    Compares the operations of both, by shapes alone.

    Raises:
        GuardOnDataDependentSymNode, DataDependentOutputException: shapes are not enough.
    """
    clone = clone_for_capture(model)
    off_meta(clone)
    for module, original in zip(clone.modules(), model.modules(), strict=True):
        module.training = original.training
    training = _operations(clone)
    evaluating = _operations(clone.eval())
    if training.names != evaluating.names:
        extra = [name for name in dict.fromkeys(training.names) if name not in evaluating.names]
    elif training.checkpointed != evaluating.checkpointed:
        return CHECKPOINTS_DIFFER
    else:
        return None
    return f"the model runs {', '.join(extra)}" if extra else "the model takes another path"


class _Record(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.checkpointed: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "prim":  # questions about a tensor, not computations
            self.names.append(str(func))
            self.checkpointed.append(under_checkpoint())
        return func(*args, **(kwargs or {}))


def _operations(model: nn.Module) -> _Record:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    state, record = State(model), _Record()
    # sizes that depend on data, such as how many tokens an expert gets, are symbols
    fake = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv(), static_shapes=True)
    with fake, record, torch.no_grad():
        model(torch.zeros(_BATCH, _LENGTH, dtype=torch.long, device=device))
    state.restore()
    return record
