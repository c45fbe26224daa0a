"""Dropout that does not depend on how many ranks share the work.

One seed is drawn for each forward and agreed on by all ranks. Whether an element is kept depends
on that seed, the place in the graph, and the element's position in the **full** tensor, so that
every rank masks its part as one rank would.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from fxport.errors import FxportError
from fxport.ops.dropout import keep_scale, philox, threshold
from fxport.parallel.context import ParallelContext

__all__ = ["AttentionRate", "EvalOnly", "KeyedDropout", "StepSeed", "WithoutDropout"]

aten = torch.ops.aten
_LOW = 0xFFFFFFFF


class StepSeed(nn.Module):
    """The seed of one forward: int64 ``[1]``, the same on every rank; 0 in eval mode.

    It comes from the default generator of the CPU, which `torch.utils.checkpoint` restores when
    it runs forward again. A collective of 8 bytes.
    """

    def __init__(self, context: ParallelContext) -> None:
        super().__init__()
        self.context = context

    def forward(self, tokens: Tensor) -> Tensor:
        if not self.training:
            return torch.zeros(1, dtype=torch.int64, device=tokens.device)
        seed = torch.randint(2**62, (1,)).to(tokens.device)
        return self.context.transport.all_reduce(seed, maximum=True)


class KeyedDropout(nn.Module):
    """Inverted dropout of a part of a tensor; identity in eval mode.

    Args:
        p: probability of dropping, 0 to 1.
        sizes: by dimension, the full size where it is divided; None where it is not.
        index: by dimension, the positions of the full tensor held; None for all.
    """

    def __init__(
        self, p: float, sizes: Sequence[int | None], index: Sequence[tuple[int, ...] | None]
    ) -> None:
        super().__init__()
        self.p, self.sizes = p, tuple(sizes)
        for dim, held in enumerate(index):
            value = None if held is None else torch.tensor(held)
            self.register_buffer(f"index_{dim}", value, persistent=False)

    def forward(self, value: Tensor, seed: Tensor) -> Tensor:
        """Any shape; `seed` int64 ``[1]``, different for each place in the graph."""
        if not self.training or self.p == 0:
            return value
        if self.p == 1:
            return value * 0
        return value * (self._keep(value, seed).to(value.dtype) * keep_scale(self.p))

    def _keep(self, value: Tensor, seed: Tensor) -> Tensor:
        position = torch.zeros((), dtype=torch.int64, device=value.device)
        for dim, (size, here) in enumerate(zip(self.sizes, value.shape, strict=True)):
            held = getattr(self, f"index_{dim}")
            if held is None:
                held = torch.arange(here, device=value.device)
            shape = [-1 if d == dim else 1 for d in range(value.dim())]
            position = position * (here if size is None else size) + held.reshape(shape)
        zero = torch.zeros((), dtype=torch.int64, device=value.device)
        word = philox(seed, (position & _LOW, position >> 32, zero, zero))[0]
        return (word >> 1) >= threshold(self.p)


class AttentionRate(nn.Module):
    """The dropout probability of an attention: 0 in eval mode."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self) -> float:
        return self.p if self.training else 0.0


class EvalOnly(nn.Module):
    """Refuses training mode, for a graph that was captured in eval mode and differs."""

    def __init__(self, why: str) -> None:
        super().__init__()
        super().train(False)
        self.why = why

    def train(self, mode: bool = True) -> EvalOnly:
        if mode:
            self._refuse()
        super().train(False)
        return self

    def _refuse(self) -> NoReturn:
        raise FxportError(
            f"this model was divided in eval mode, but {self.why} in training mode: "
            "call fxport.parallelize(model.train(), ctx)"
        )


class WithoutDropout(TorchDispatchMode):
    """A Bernoulli draw gives its mean, so inverted dropout keeps its input as it is.

    All that is random otherwise (`torch.rand(...) < p`) stays random.
    """

    def __enter__(self) -> WithoutDropout:
        self._kernels = ExitStack()
        # flash kernels draw by themselves; this one is made of operations
        self._kernels.enter_context(sdpa_kernel(SDPBackend.MATH))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._kernels.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten.bernoulli_.float:
            drawn, *given = args
            return drawn.fill_(given[0] if given else 0.5)
        if func is aten.native_dropout.default:
            value = args[0]
            return value.clone(), torch.ones_like(value, dtype=torch.bool)
        return func(*args, **(kwargs or {}))
