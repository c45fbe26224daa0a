"""Tensor parallelism: the rank's context, the collectives and the plan."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fxport.parallel.clipping import clip_grad_norm_
    from fxport.parallel.loss import TokenLoss

__all__ = ["TokenLoss", "clip_grad_norm_"]


def __getattr__(name: str) -> object:
    # On first use: clipping knows fxport.nn, which is built on this package.
    if name == "clip_grad_norm_":
        from fxport.parallel.clipping import clip_grad_norm_

        return clip_grad_norm_
    if name == "TokenLoss":
        from fxport.parallel.loss import TokenLoss

        return TokenLoss
    raise AttributeError(f"module 'fxport.parallel' has no attribute {name!r}")
