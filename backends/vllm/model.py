"""The model class that vLLM instantiates for a saved port."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.sequence import IntermediateTensors

from fxport.backends.vllm.assemble import assemble
from fxport.backends.vllm.division import summary
from fxport.backends.vllm.targets import fill
from fxport.errors import FxportError, SavedPortError
from fxport.passes.tokens.rules import may_be_saved
from fxport.saved import GRAPH_FILE, read_serving

__all__ = ["FxportForCausalLM", "FxportModel"]

_LOG = init_logger("vllm.fxport")  # below vLLM's own logger, so that its settings hold


def _directory(vllm_config: VllmConfig) -> Path:
    """Where the port lies: a local directory, or the snapshot that vLLM took from a hub."""
    model = vllm_config.model_config.model
    if Path(model).is_dir():
        return Path(model)
    from transformers.utils import cached_file

    found = cached_file(model, GRAPH_FILE, revision=vllm_config.model_config.revision)
    if found is None:
        raise SavedPortError(f"{model} holds no {GRAPH_FILE}: it is not a saved port")
    return Path(found).parent


def _request_matrix_unit() -> None:
    """Asks Linux for the CPU's AMX registers, where there are any.

    vLLM's bfloat16 attention on CPUs uses them without asking, and dies of SIGILL where nothing
    before it (a oneDNN product, say) has asked.
    """
    if current_platform.is_cpu():
        torch.cpu._init_amx()


@support_torch_compile(
    dynamic_arg_dims={"input_ids": 0, "positions": 0, "intermediate_tensors": 0, "inputs_embeds": 0}
)
class FxportModel(nn.Module):
    """Everything up to the last hidden state; compiled and captured in CUDA graphs by vLLM."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        dtype = vllm_config.model_config.dtype
        assert isinstance(dtype, torch.dtype)  # vLLM has resolved "auto" by now
        _request_matrix_unit()
        device = torch.get_default_device()
        serving = read_serving(_directory(vllm_config), may_be_saved, dtype, device)
        assembled = assemble(serving, vllm_config, prefix)
        self.embed = assembled.embed
        self.body = assembled.body
        self.head = assembled.head
        self.needs_input_ids = "input_ids" in serving.body.inputs
        self.targets = assembled.targets
        self.plan = assembled.plan
        self.weight_bytes = sum(p.numel() * p.element_size() for p in self.parameters())
        if self.plan is not None and get_tensor_model_parallel_rank() == 0:
            _LOG.info("%s", summary(self.plan, dtype.itemsize))
        self.aliases = serving.aliases
        constants = set(serving.constants) - set(assembled.targets)  # e.g. slopes: numbers by now
        self.unused = frozenset(serving.unused) | constants

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """``[N]`` -> ``[N, C]``"""
        return self.embed(input_ids[None])[0]

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``[N]`` tokens (or ``[N, C]`` embeddings) and positions -> hidden states ``[N, C]``."""
        if inputs_embeds is None:
            assert input_ids is not None
            inputs_embeds = self.embed_input_ids(input_ids)
        if not self.needs_input_ids:
            return self.body(inputs_embeds[None], positions)[0]
        if input_ids is None:
            raise FxportError("this model looks its token ids up again: embeddings are not enough")
        return self.body(inputs_embeds[None], positions, input_ids[None])[0]


class FxportForCausalLM(nn.Module):
    """A saved port as vLLM wants it: see ``vllm.model_executor.models.interfaces_base``."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.config = vllm_config.model_config.hf_config
        name = f"{prefix}.model" if prefix else "model"
        self.model = FxportModel(vllm_config=vllm_config, prefix=name)
        # The first load must fill everything; later ones may bring new values for some.
        self._incomplete = vllm_config.load_config.load_format != "dummy"

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """``[M, C]`` -> ``[M, V]``"""
        return self.model.head(hidden_states[None])[0]

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Fills parameters and constants, in place (CUDA graphs keep their addresses).

        Names of the original's state_dict that serving does not need are passed over, and so are
        constants of the graph for another dtype.

        Raises:
            SavedPortError: an unknown name, a shape that does not fit, or, at the first load, a
                tensor that the checkpoint does not hold.
        """
        targets = self.model.targets
        seen: set[str] = set()
        for checkpoint_name, tensor in weights:
            name = self.model.aliases.get(checkpoint_name, checkpoint_name)
            if name not in targets:
                if name in self.model.unused:
                    continue
                raise SavedPortError(f"the checkpoint holds `{name}`, which the port does not know")
            for target in targets[name]:
                fill(name, target, tensor)
            seen.add(name)
        missing = sorted(targets.keys() - seen)
        if missing and self._incomplete:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise SavedPortError(f"the checkpoint holds no values for `{missing[0]}`{more}")
        self._incomplete = False
        return self._loaded(seen)

    def _loaded(self, seen: set[str]) -> set[str]:
        """Parameters that are filled in all their parts."""
        fillers: dict[int, set[str]] = {}
        for name, targets in self.model.targets.items():
            for target in targets:
                fillers.setdefault(id(target.tensor()), set()).add(name)
        return {
            name
            for name, parameter in self.named_parameters()
            if id(parameter) in fillers and fillers[id(parameter)] <= seen
        }
