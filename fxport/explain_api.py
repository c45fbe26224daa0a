"""`fxport.explain`: what would be rewritten, what would not, and the line that is in the way.

explain(model)                    the serving door: what `fxport.port(model)` would do
explain(model_or_function, *args) the training door: what ``backend="vllm_generic"`` would do
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fxport.errors import FxportError
from fxport.explain_records import Explanation

__all__ = ["explain"]


def explain(target: nn.Module | Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Explains every softmax, linear and position-dependent value; changes nothing.

    Without arguments a module is explained as `fxport.port` would see it, and everything in the
    way is listed, not the first thing only. With arguments, a function or module is called once
    under `torch.compile` and explained as ``torch.compile(..., backend="vllm_generic")`` would
    see it, in the mode (train or eval, grad or not) that it is in. Dynamo's caches are emptied
    by that. A module with token ids (int64 ``[B, T]``) alone is explained for both: a port keeps
    the logits only, while a compiled model also gives back what else it returns.

    Raises:
        FxportError: a plain function without arguments.
        Exception: whatever the function raises when it is called (training door).
    """
    from fxport.capture.clone import uncompiled
    from fxport.capture.conventions import adaptations
    from fxport.explain_serving import explain_serving
    from fxport.explain_training import explain_training

    if isinstance(target, nn.Module):
        target = uncompiled(target)
    if isinstance(target, nn.Module) and _is_serving(args, kwargs):
        served = explain_serving(target)
        if served.obstacles:
            adapted, decisions = adaptations(target)
            served = explain_serving(adapted) if decisions else served
        return replace(served, training=explain_training(target, args, {})) if args else served
    if not args and not kwargs:
        raise FxportError("explain(function) needs the arguments to call it with")
    return explain_training(target, args, kwargs)


def _is_serving(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if kwargs or len(args) > 1:
        return False
    return not args or (
        isinstance(args[0], torch.Tensor) and args[0].dtype == torch.int64 and args[0].dim() == 2
    )
