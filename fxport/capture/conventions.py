"""How a model is called, where that is not ``forward(ids[B, T]) -> logits [B, T, V]``.

One adaptation after the other, each by what the model's answers on a few tokens look like.
"""

from __future__ import annotations

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fxport.capture.clone import clone_to_run
from fxport.capture.layouts import Layout, as_batch_first, layout_of
from fxport.capture.location import forward_line
from fxport.capture.losses import logits_of_the_loss, returns_losses
from fxport.capture.questions import forward_only
from fxport.capture.sample import device_of
from fxport.errors import PortError
from fxport.report import Decision, Outcome

__all__ = ["adaptations"]

# Of the token ids that are tried: different from each other and from few features.
_ROWS, _LENGTH = 4, 7


def adaptations(model: nn.Module) -> tuple[nn.Module, tuple[Decision, ...]]:
    """A copy that takes ``[B, T]`` and gives logits, and what was put around the model.

    A guess that saves a refusal, no proof: what is called so is proven afterwards.

    Returns:
        The model itself and no decision where nothing else is known to call.

    Raises:
        PortError: the model cannot be copied, or returns a loss that shows no logits.
    """
    decisions = []
    line = forward_line(model)
    if _returns_losses(model):
        model = logits_of_the_loss(model)
        detail = "forward returns it; the logits are what its cross entropy is asked"
        decisions.append(Decision("capture", Outcome.REWRITTEN, "loss", detail, location=line))
    layout = layout_of(model)
    if layout is not Layout.BATCH_FIRST:
        model = as_batch_first(model, layout)
        gives = " and gives [B, T, V]" if layout is Layout.LOGITS_TIME_FIRST else ""
        detail = f"forward takes {layout}; the port takes [B, T]{gives}, as vLLM does"
        subject = "layout of the tokens"
        decisions.append(Decision("capture", Outcome.REWRITTEN, subject, detail, location=line))
    return model, tuple(decisions)


def _returns_losses(model: nn.Module) -> bool:
    clone = clone_to_run(model)
    ids = torch.zeros(_ROWS, _LENGTH, dtype=torch.long, device=device_of(clone))
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    for tokens in (ids, ids[:1], ids[0]):
        try:
            with forward_only(clone), mode:
                if returns_losses(clone, mode.from_tensor(tokens)):
                    return True
        except PortError:
            raise
        except Exception:  # not tokens that the model takes
            continue
    return False
