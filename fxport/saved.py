"""The saved port: a directory of data that vLLM loads by itself.

config.json          architecture, sizes, dtype: what vLLM reads first
fxport_graph.json    the serving graphs (`fxport.graph_json`)
model-*.safetensors  parameters under the original names, constants beside them
port_report.json     what was decided
tokenizer files      if a tokenizer was given
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch

from fxport.errors import FxportError, SavedPortError
from fxport.graph_json import Allowed, part_from_dict, part_to_dict
from fxport.ops.params import AttentionParams
from fxport.report import Report
from fxport.serving import AttentionLayer, ServingGraph

__all__ = [
    "FORMAT_VERSION",
    "Tokenizer",
    "own_dtype",
    "read_config",
    "read_serving",
    "write_port",
]

FORMAT_VERSION = 2
GRAPH_FILE = "fxport_graph.json"
DIGEST_KEY = "fxport_graph_sha256"  # in config.json: a flipped bit must not become another graph
_MAX_SHARD_BYTES = 4 * 2**30


class Tokenizer(Protocol):
    """Anything with Hugging Face's `save_pretrained`."""

    def save_pretrained(self, directory: str) -> object: ...


class GenerationConfig(Protocol):
    """Anything with Hugging Face's `GenerationConfig.to_json_file`."""

    def to_json_file(self, json_file_path: str) -> object: ...


def write_port(
    directory: str | Path,
    serving: ServingGraph,
    half: ServingGraph | None,
    parameters: Mapping[str, torch.Tensor],
    report: Report,
    allowed: Allowed,
    tokenizer: Tokenizer | str | Path | None = None,
    generation: GenerationConfig | None = None,
) -> Path:
    """Writes a port. The directory appears complete or not at all.

    Args:
        directory: must not exist, or be empty.
        serving: the graph for the parameters' own dtype.
        half: the graph for half precision, where that is another one.
        parameters: real tensors for every name in ``serving.parameters``.
        tokenizer: an object with `save_pretrained`, or a directory whose files are copied.
        generation: the model's own defaults for sampling; they win over the tokenizer's directory.

    Raises:
        FxportError: the directory exists, or a parameter has no data.
    """
    final = Path(directory)
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise FxportError(f"{final} exists already; choose another directory or remove it")
    for name in serving.parameters:
        if parameters[name].is_meta:
            raise FxportError(f"the parameter `{name}` is on the meta device: it has no data")
    final.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
    try:
        graphs = {"own": _graph_dict(serving, allowed)}
        if half is not None:
            graphs["half"] = _graph_dict(half, allowed)
        content = {"format_version": FORMAT_VERSION, "dtype": _name(serving.dtype), **graphs}
        _write_json(staging / GRAPH_FILE, content)
        digest = hashlib.sha256((staging / GRAPH_FILE).read_bytes()).hexdigest()
        _write_json(staging / "config.json", {**_config_dict(serving), DIGEST_KEY: digest})
        report.to_json(staging / "port_report.json")
        constants = {**(half.constants if half is not None else {}), **serving.constants}
        _write_weights(staging, {**{n: parameters[n] for n in serving.parameters}, **constants})
        _write_tokenizer(staging, tokenizer)
        if generation is not None:
            generation.to_json_file(str(staging / "generation_config.json"))
        staging.chmod(0o755)
        if final.exists():
            final.rmdir()
        staging.replace(final)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return final


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, allow_nan=False), encoding="utf-8")


def _graph_dict(serving: ServingGraph, allowed: Allowed) -> dict[str, Any]:
    return {
        "embed": part_to_dict(serving.embed, allowed, serving.dtype),
        "body": part_to_dict(serving.body, allowed, serving.dtype),
        "head": part_to_dict(serving.head, allowed, serving.dtype),
        "attention": [asdict(layer) for layer in serving.attention],
        "parameters": {name: _parameter_dict(serving, name) for name in serving.parameters},
        "constants": {
            name: {"shape": list(t.shape), "dtype": _name(t.dtype)}
            for name, t in serving.constants.items()
        },
        "aliases": dict(serving.aliases),
        "unused": list(serving.unused),
        "untrainable": list(serving.untrainable),
        "vocab_size": serving.vocab_size,
        "hidden_size": serving.hidden_size,
        "max_position_embeddings": serving.max_position_embeddings,
    }


def _parameter_dict(serving: ServingGraph, name: str) -> Any:
    """The shape; and the dtype where it is not the model's."""
    shape = list(serving.parameters[name])
    odd = serving.dtypes.get(name)
    return shape if odd is None else {"shape": shape, "dtype": _name(odd)}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _config_dict(serving: ServingGraph) -> dict[str, Any]:
    """vLLM sizes its KV cache from the attention layers; the heads here are for its logs."""
    first = serving.attention[0]
    return {
        "architectures": ["FxportForCausalLM"],
        "model_type": "fxport",
        "fxport_format_version": FORMAT_VERSION,
        "vocab_size": serving.vocab_size,
        "hidden_size": serving.hidden_size,
        "num_hidden_layers": len(serving.attention),
        "num_attention_heads": first.num_heads,
        "num_key_value_heads": first.num_kv_heads,
        "head_dim": first.head_size,
        "max_position_embeddings": serving.max_position_embeddings,
        "dtype": _name(serving.dtype),
        "tie_word_embeddings": False,
    }


# --- weights ----------------------------------------------------------------------------------


def _write_weights(directory: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    from safetensors.torch import save_file

    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        count = tensor.numel() * tensor.element_size()
        if shards[-1] and size + count > _MAX_SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += count
    for number, names in enumerate(shards, start=1):
        content = _storable({name: tensors[name] for name in names})
        file = directory / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(content, str(file), metadata={"format": "pt"})


def _storable(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Dense, on the CPU; complex numbers as pairs, which every safetensors version reads.

    Copies only what is not so already, or shares its memory with another: the file is written
    from where the tensors lie.
    """
    seen: set[int] = set()
    content: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        plain = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        plain = plain.detach().cpu().contiguous()
        storage = plain.untyped_storage()
        alone = storage.nbytes() == plain.numel() * plain.element_size()
        if not alone or storage.data_ptr() in seen:
            plain = plain.clone()
        seen.add(plain.untyped_storage().data_ptr())
        content[name] = plain
    return content


def _write_tokenizer(directory: Path, tokenizer: Tokenizer | str | Path | None) -> None:
    if tokenizer is None:
        return
    if isinstance(tokenizer, str | Path):
        source = Path(tokenizer)
        if not source.is_dir():
            raise FxportError(f"the tokenizer directory {source} does not exist")
        for file in _tokenizer_files(source):
            shutil.copyfile(file, directory / file.name)
    else:
        tokenizer.save_pretrained(str(directory))


def _tokenizer_files(source: Path) -> Iterator[Path]:
    """Everything but weights and model descriptions, which the port writes itself."""
    own = {"config.json", GRAPH_FILE, "port_report.json"}
    weights = {".safetensors", ".bin", ".pt", ".pth", ".py"}
    for file in sorted(source.iterdir()):
        if file.is_file() and file.name not in own and file.suffix not in weights:
            yield file


# --- reading ----------------------------------------------------------------------------------


def read_config(directory: str | Path) -> dict[str, Any]:
    """`config.json` of a saved port, checked to be one.

    Raises:
        SavedPortError: it is missing, damaged, or some other model's.
    """
    config = _parsed(Path(directory) / "config.json", _bytes(Path(directory) / "config.json"))
    if config.get("model_type") != "fxport":
        raise SavedPortError(f"{directory} is not a saved port (model_type is not fxport)")
    return config


def own_dtype(directory: str | Path, config: Mapping[str, Any]) -> torch.dtype:
    """The parameters' dtype, as `read_config` of this directory gives it.

    Raises:
        SavedPortError: it names none.
    """
    dtype = getattr(torch, str(config.get("dtype")), None)
    if not isinstance(dtype, torch.dtype):
        raise SavedPortError(f"{directory}: config.json names no dtype")
    return dtype


def read_serving(
    directory: str | Path, allowed: Allowed, dtype: torch.dtype, device: torch.device
) -> ServingGraph:
    """The serving graph of a saved port; constants stay on the meta device (weights come later).

    Args:
        dtype: in which the parameters will be; half precision has a graph of its own.
        device: where tensors that the graph makes are put.

    Raises:
        SavedPortError: the directory is damaged, hostile, of another version, or holds no graph
            for this dtype.
    """
    file = Path(directory) / GRAPH_FILE
    content = _bytes(file)
    if hashlib.sha256(content).hexdigest() != read_config(directory).get(DIGEST_KEY):
        raise SavedPortError(f"{file} is not the file that config.json was written for")
    data = _parsed(file, content)
    if data.get("format_version") != FORMAT_VERSION:
        raise SavedPortError(
            f"format version {data.get('format_version')!r}; this fxport reads {FORMAT_VERSION}"
        )
    half = dtype in (torch.bfloat16, torch.float16) and "half" in data
    if not half and data.get("dtype") != _name(dtype):
        raise SavedPortError(
            f"this port is for {data.get('dtype')} and cannot be served in {_name(dtype)} "
            "(port_report.json says why); pass dtype to LLM, or port the model in that dtype"
        )
    graph = data.get("half" if half else "own")
    try:
        serving = _serving(graph, allowed, dtype, device)
        stored = {n for g in ("own", "half") if g in data for n in data[g]["constants"]}
        others = sorted(stored - set(serving.constants))
        return dataclasses.replace(serving, unused=(*serving.unused, *others))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise SavedPortError(f"{GRAPH_FILE} is damaged: {error!r}") from error


def _serving(data: Any, allowed: Allowed, dtype: torch.dtype, device: torch.device) -> ServingGraph:
    return ServingGraph(
        embed=part_from_dict(data["embed"], allowed, dtype, device),
        body=part_from_dict(data["body"], allowed, dtype, device),
        head=part_from_dict(data["head"], allowed, dtype, device),
        attention=tuple(_attention_layer(a) for a in data["attention"]),
        constants={n: _meta_tensor(n, t) for n, t in data["constants"].items()},
        parameters={
            str(n): _shape(n, s["shape"] if isinstance(s, dict) else s)
            for n, s in data["parameters"].items()
        },
        aliases={str(k): str(v) for k, v in data["aliases"].items()},
        unused=tuple(str(u) for u in data["unused"]),
        untrainable=tuple(str(u) for u in data["untrainable"]),
        vocab_size=_size(data["vocab_size"]),
        hidden_size=_size(data["hidden_size"]),
        max_position_embeddings=_size(data["max_position_embeddings"]),
        dtype=dtype,
        dtypes={
            str(n): _dtype(s["dtype"]) for n, s in data["parameters"].items() if isinstance(s, dict)
        },
    )


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise SavedPortError(f"{path} is missing") from error
    except OSError as error:
        raise SavedPortError(f"{path} cannot be read: {error}") from error


def _parsed(path: Path, content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content.decode("utf-8"))
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise SavedPortError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise SavedPortError(f"{path} does not hold an object")
    return found


def _attention_layer(data: Any) -> AttentionLayer:
    sinks, slopes = data["sinks"], data["alibi_slopes"]
    return AttentionLayer(
        num_heads=_size(data["num_heads"]),
        num_kv_heads=_size(data["num_kv_heads"]),
        head_size=_size(data["head_size"]),
        head_size_v=_size(data["head_size_v"]),
        params=AttentionParams(**data["params"]),
        sinks=sinks if isinstance(sinks, str) else _per_head(sinks),
        alibi_slopes=_per_head(slopes),
    )


def _per_head(data: Any) -> tuple[float, ...] | None:
    return None if data is None else tuple(float(x) for x in data)


def _size(value: Any) -> int:
    if not isinstance(value, int) or not 0 < value < 2**40:
        raise ValueError(f"{value!r} is not a size")
    return value


def _dtype(name: Any) -> torch.dtype:
    found = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{name!r} is not a dtype")
    return found


def _meta_tensor(name: str, data: Any) -> torch.Tensor:
    return torch.empty(_shape(name, data["shape"]), dtype=_dtype(data["dtype"]), device="meta")


def _shape(name: str, sizes: Any) -> tuple[int, ...]:
    shape = tuple(int(s) for s in sizes)
    if any(s < 0 for s in shape) or math.prod(shape) >= 2**48:
        raise ValueError(f"`{name}` has an absurd shape")
    return shape
