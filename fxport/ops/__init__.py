"""The semantic ops. ``attention`` registers and calls ``torch.ops.fxport.attention``."""

from fxport.ops.attention import attention
from fxport.ops.params import AttentionParams

__all__ = ["AttentionParams", "attention"]
