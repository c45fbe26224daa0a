"""The model class that vLLM instantiates for a model registered with `fxport.register_model`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_tp_group
from vllm.sequence import IntermediateTensors

from fxport.backends.vllm.layers import PagedAttention
from fxport.errors import FxportError
from fxport.nn.attention import FlashCore, VLLMFlashAttention
from fxport.nn.checkpoint import BUILDER_KEY, fill_model
from fxport.nn.registry import find_builder
from fxport.nn.shards import ShardedModule
from fxport.parallel.context import ParallelContext
from fxport.serving import AttentionLayer

__all__ = ["FxportBuilderForCausalLM"]

_METHODS = ("hidden_states", "compute_logits")


class FxportBuilderForCausalLM(nn.Module):
    """What ``build(config, parallel_context)`` returns, on vLLM's paged cache.

    Raises:
        FxportError: nothing is registered under the name in config.json, or the module lacks
            what vLLM needs (see `fxport.register_model`).
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        entries = vllm_config.model_config.hf_config.to_dict()
        name = entries.get(BUILDER_KEY)
        if not isinstance(name, str):
            raise FxportError(f"config.json does not say {BUILDER_KEY}, the registered name")
        group = get_tp_group()
        context = ParallelContext(group.rank_in_group, group.world_size, group.device_group)
        self.model = find_builder(name)(SimpleNamespace(**entries), context).eval()
        _check_interface(name, self.model, context)
        self.vocab_size = int(entries["vocab_size"])
        base = f"{prefix}.layers" if prefix else "layers"
        # vLLM's prefix holds exactly one integer.
        for index, block in enumerate(_attention_blocks(self.model)):
            block.core = PagedAttention(
                _geometry(block), None, vllm_config, f"{base}.{index}.attention"
            )

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """vLLM asks for it by name; prompts given as embeddings are not served."""
        raise FxportError("a model built by a callback takes token ids, not embeddings")

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """``[N]`` tokens and positions -> hidden states ``[N, C]``."""
        if input_ids is None or inputs_embeds is not None:
            raise FxportError("a model built by a callback takes token ids, not embeddings")
        hidden: Tensor = self.model.hidden_states(input_ids, positions)  # type: ignore[operator]
        return hidden

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """``[M, C]`` -> ``[M, V]``"""
        logits: Tensor = self.model.compute_logits(hidden_states)  # type: ignore[operator]
        return logits

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Fills every parameter with this rank's part, then checks that tokens stay apart.

        Raises:
            SavedPortError: checkpoint and model differ in names or shapes.
            FxportError: the model mixes tokens outside `VLLMFlashAttention`.
        """
        # Without vLLM's attention layers, whose own buffers are in no checkpoint.
        with _values_only(self.model), torch.no_grad():
            filled = fill_model(self.model, weights)
            check_tokens_stay_apart(self.model, self.vocab_size)
        return {f"model.{name}" for name in filled}


def _attention_blocks(model: nn.Module) -> Iterator[VLLMFlashAttention]:
    return (module for module in model.modules() if isinstance(module, VLLMFlashAttention))


def _check_interface(name: str, model: nn.Module, context: ParallelContext) -> None:
    missing = [method for method in _METHODS if not callable(getattr(model, method, None))]
    if missing:
        raise FxportError(
            f"the model built for {name!r} ({type(model).__name__}) has no "
            f"{' and no '.join(missing)}: vLLM needs "
            "hidden_states(input_ids [N], positions [N]) -> [N, C] and "
            "compute_logits(hidden [M, C]) -> [M, V]"
        )
    if not any(True for _ in _attention_blocks(model)):
        raise FxportError(
            f"the model built for {name!r} has no VLLMFlashAttention: nothing to cache"
        )
    for path, module in model.named_modules():
        divided = isinstance(module, ShardedModule | VLLMFlashAttention)
        if divided and module.parallel_context != context:
            raise FxportError(
                f"{path} of the model built for {name!r} was not given the parallel_context "
                "that build received"
            )


def _geometry(block: VLLMFlashAttention) -> AttentionLayer:
    """Heads of this rank: vLLM's layer counts them so."""
    if type(block.core) is not FlashCore:
        raise FxportError("VLLMFlashAttention.core was replaced: vLLM would not see its attention")
    return AttentionLayer(
        block.num_heads, block.num_kv_heads, block.head_dim, block.head_dim, block.params
    )


class _ValuesOnly(nn.Module):
    """Attention of tokens that see themselves alone."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)


@contextmanager
def _values_only(model: nn.Module) -> Iterator[None]:
    """Tokens of all attention blocks see only themselves while this lasts."""
    cores = [(block, block.core) for block in _attention_blocks(model)]
    try:
        for block, _ in cores:
            block.core = _ValuesOnly()
        yield
    finally:
        for block, core in cores:
            block.core = core


def check_tokens_stay_apart(model: nn.Module, vocab_size: int) -> None:
    """Where attention sees only the token itself, no token may change with another one.

    vLLM hands over the tokens of many requests end to end: a model that mixes them anywhere else
    (another attention, a convolution, a cumulative sum, a position counted by index) would give
    one request the words of another.

    Raises:
        FxportError: an output changes with another token, or with the order of the tokens.
    """
    device = next(model.parameters()).device
    ids = torch.arange(1, 7, device=device) % vocab_size
    positions = torch.tensor([4, 0, 2, 5, 3, 1], device=device)
    expected = model.hidden_states(ids, positions)  # type: ignore[operator]
    bound = 64 * torch.finfo(expected.dtype).eps * float(expected.abs().max())
    order = torch.tensor([5, 2, 0, 3, 1, 4], device=device)
    moved = model.hidden_states(ids[order], positions[order])  # type: ignore[operator]
    apart = _near(moved, expected[order], bound)
    for changed in (0, 5):
        others = torch.arange(6, device=device) != changed
        other_ids = ids.where(others, (ids + 1) % vocab_size)
        found = model.hidden_states(other_ids, positions)  # type: ignore[operator]
        apart = apart and _near(found[others], expected[others], bound)
    if not apart:
        raise FxportError(
            "the model mixes tokens outside VLLMFlashAttention, or counts positions by index "
            "instead of using `positions`: in vLLM requests would change each other"
        )


def _near(one: Tensor, other: Tensor, bound: float) -> bool:
    return bool(((one - other).abs() <= bound).all())
