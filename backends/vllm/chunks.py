"""Attention within chunks of positions, by vLLM's attention with a window.

    row i sees column j <= i  iff  i // chunk == j // chunk

A window of one chunk's length leaves a row its own chunk and a part of the one before, and chunks
that follow each other are told apart by whether their number is even. Two more numbers in each head
say that: of the products that they add to the scores, those within a chunk are 0 exactly, and the
others forbid.

    q    -far in the first where its chunk is even, in the second where it is odd
    k    near in the first where its chunk is odd, in the second where it is even

vLLM's `ChunkedLocalAttention` computes half of what a window looks at, but it asserts, once the
engine runs, that the cache's blocks divide the chunk (on CPUs they hold 128 tokens), knows neither
sinks nor several sizes of chunks in one cache, and keeps the whole engine from full CUDA graphs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from vllm.config import VllmConfig
from vllm.platforms import current_platform

from fxport.errors import FxportError
from fxport.ops.params import AttentionParams

__all__ = ["ChunkFlags"]

_HARD = 2.0**24  # scores that are lower by this have no weight: `passes.masks.prover`
_NEAR = 2.0**12
_MOST = 2.0**15  # float16 holds no more than twice this


@dataclass(frozen=True)
class ChunkFlags:
    """What keeps rows from the chunk before theirs.

    Attributes:
        chunk: how many positions see only each other.
        window_left: how far back the window goes that leaves nothing but two chunks.
        far: what stands in q where the chunk's keys are forbidden.
    """

    chunk: int
    window_left: int
    far: float

    size = 2  # numbers that are added to each head

    @staticmethod
    def of(params: AttentionParams, vllm_config: VllmConfig) -> ChunkFlags | None:
        """Of a layer with these numbers; None where no sequence is longer than a chunk.

        Raises:
            FxportError: nothing that is added to the scores forbids a key; or this is no CPU:
                on an H200 a layer with another head size beside it was refused by FlexAttention,
                and with Triton's tf32 the answers were not close enough to tell why.
        """
        chunk, window = params.chunk, params.window_left
        if chunk == 0 or vllm_config.model_config.max_model_len <= chunk:
            return None
        if params.softcap or params.scale == 0:
            raise FxportError(
                f"attention in chunks of {chunk} cannot be served together with a softcap"
                " or a scale of 0: vLLM's layers cap the number that would forbid a key"
                f" (sequences of at most {chunk} tokens can: max_model_len={chunk})"
            )
        if not current_platform.is_cpu():
            raise FxportError(
                f"attention in chunks of {chunk} is served on CPUs only: on a GPU the engine's"
                " answers have not been shown to be the original's"
                f" (sequences of at most {chunk} tokens can: max_model_len={chunk})"
            )
        far = min(_HARD / _NEAR / abs(params.scale), _MOST)
        return ChunkFlags(
            chunk,
            min(window, chunk - 1) if window >= 0 else chunk - 1,
            -far if params.scale > 0 else far,
        )

    def append(
        self, q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``[1, H, N, D]`` with positions ``[N]`` -> ``[1, H, N, D + size]``."""
        odd = (positions // self.chunk) % 2
        chunks = torch.stack((1 - odd, odd), -1)  # is it even, is it odd
        return _joined(q, chunks * self.far), _joined(k, chunks.flip(-1) * _NEAR)


def _joined(x: torch.Tensor, flags: torch.Tensor) -> torch.Tensor:
    flags = flags.to(x.dtype).expand(*x.shape[:2], -1, -1)
    return torch.cat((x, flags), -1)
