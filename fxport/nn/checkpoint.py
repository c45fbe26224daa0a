"""Checkpoints of models made of the building blocks: full tensors under their own names.

A directory written on any number of ranks loads on any other number, and in vLLM.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fxport.errors import FxportError, SavedPortError
from fxport.nn.shards import copy_part, full_state_dict, shards_of
from fxport.parallel.context import ParallelContext

__all__ = ["ARCHITECTURE", "BUILDER_KEY", "fill_model", "load_model", "save_model"]

ARCHITECTURE = "FxportBuilderForCausalLM"
BUILDER_KEY = "fxport_builder"
WEIGHTS_FILE = "model.safetensors"
_REQUIRED = (
    BUILDER_KEY,
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)


def save_model(
    model: nn.Module,
    directory: str | Path,
    config: Mapping[str, Any],
    parallel_context: ParallelContext | None = None,
) -> Path:
    """Writes config.json and model.safetensors for `load_model` and ``vllm.LLM(directory)``.

    A collective: every rank calls it, rank 0 writes. Tied tensors are written once.

    Args:
        directory: must not exist, or be empty.
        config: JSON values; ``fxport_builder`` (the registered name), ``vocab_size``,
            ``hidden_size``, ``num_hidden_layers``, ``num_attention_heads`` and
            ``max_position_embeddings`` (longest sequence, tokens) are required, others are yours.
        parallel_context: None is one rank.

    Raises:
        FxportError: a required entry is missing, or the directory exists.
    """
    from safetensors.torch import save_file

    absent = [key for key in _REQUIRED if key not in config]
    if absent:
        raise FxportError(f"config needs {', '.join(absent)}")
    target = Path(directory)
    state = full_state_dict(model)
    if parallel_context is not None and parallel_context.rank:
        return target
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FxportError(f"{target} exists already; choose another directory or remove it")
    target.mkdir(parents=True, exist_ok=True)
    written: dict[int, str] = {}
    for name, value in state.items():
        written.setdefault(id(value), name)
    tensors = {name: state[name].cpu().contiguous() for name in written.values()}
    save_file(tensors, target / WEIGHTS_FILE, metadata={"format": "pt"})
    dtypes = {p.dtype for p in model.parameters()}
    content: dict[str, Any] = {"architectures": [ARCHITECTURE], "model_type": "fxport"}
    if len(dtypes) == 1:
        content["dtype"] = str(dtypes.pop()).removeprefix("torch.")
    text = json.dumps({**config, **content}, indent=1, allow_nan=False)
    (target / "config.json").write_text(text, encoding="utf-8")
    return target


def load_model(model: nn.Module, directory: str | Path) -> None:
    """Fills `model` from a directory of `save_model`; a rank reads its own part of each tensor.

    Raises:
        SavedPortError: names or shapes of checkpoint and model differ.
    """
    from safetensors import safe_open

    with safe_open(Path(directory) / WEIGHTS_FILE, framework="pt") as file:
        # The file is mapped: of a tensor that is only cut, the rest is never read.
        fill_model(model, ((name, file.get_tensor(name)) for name in file.keys()))  # noqa: SIM118


def fill_model(model: nn.Module, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
    """Copies this rank's part of full tensors into the model; returns the names it filled.

    Raises:
        SavedPortError: a name that the model does not know, a shape that does not fit, or a
            tensor of the model that got no values.
    """
    held = _tensors(model)
    shards = shards_of(model)
    filled: set[int] = set()
    for name, full in weights:
        if name not in held:
            raise SavedPortError(f"the checkpoint holds `{name}`, which the model does not know")
        shard, context = shards.get(name, (None, None))
        copy_part(name, held[name], full, shard, context.rank if context else 0)
        filled.add(id(held[name]))
    missing = sorted(name for name, tensor in held.items() if id(tensor) not in filled)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise SavedPortError(f"the checkpoint holds no values for `{missing[0]}`{more}")
    return set(held)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers, tied ones as one object under each name."""
    found: dict[str, Tensor] = model.state_dict(keep_vars=True)
    return found
