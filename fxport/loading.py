"""`fxport.load`: a saved port back in plain PyTorch, without the model's source.

my_model/  ->  Loaded(serving graph, parameters under the original names, module)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fxport.errors import SavedPortError
from fxport.saved import own_dtype, read_config, read_serving
from fxport.serving import ServingGraph

if TYPE_CHECKING:
    from fxport.backends.torch import PortedModel

__all__ = ["Loaded", "check_weights", "load"]


@dataclass(frozen=True)
class Loaded:
    """A saved port, read and checked.

    Attributes:
        serving: the graphs, constants with their values.
        parameters: qualified name of the original -> tensor.
        config: what `config.json` says.
    """

    serving: ServingGraph
    parameters: Mapping[str, torch.Tensor] = field(repr=False)
    config: Mapping[str, Any] = field(repr=False)

    @cached_property
    def module(self) -> PortedModel:
        """Tokens ``[B, T]`` int64 -> logits ``[B, T, V]``; parameters require gradients."""
        from fxport.backends.torch import PortedModel

        return PortedModel(self.serving, self.parameters)


def load(directory: str | Path, device: torch.device | str = "cpu") -> Loaded:
    """Reads a saved port in the dtype it was saved in. Nothing of it is executed.

    Args:
        directory: from `Port.save`.
        device: where the weights are put.

    Raises:
        SavedPortError: a file is missing, damaged or hostile; weights that the graph needs are
            missing, are of another shape or dtype, or are too many.
    """
    from fxport.passes.tokens.rules import may_be_saved

    where = torch.device(device)
    config = read_config(directory)
    serving = read_serving(directory, may_be_saved, own_dtype(directory, config), where)
    specs = _specs(serving)
    check_weights(directory, serving)
    found = _tensors(Path(directory), where)
    found = {serving.aliases.get(name, name): tensor for name, tensor in found.items()}
    values = {name: _fitting(name, found[name], spec) for name, spec in specs.items()}
    constants = {name: values[name] for name in serving.constants}
    return Loaded(
        serving=dataclasses.replace(serving, constants=constants),
        parameters={name: values[name] for name in serving.parameters},
        config=config,
    )


def check_weights(directory: str | Path, serving: ServingGraph) -> None:
    """Names and shapes in the headers of the weight files, before anything is read or allocated.

    Raises:
        SavedPortError: a file cannot be read; a tensor is missing, unknown, held twice, or of
            another shape than the graph needs.
    """
    specs = _specs(serving)
    known = specs.keys() | set(serving.unused) | serving.aliases.keys()
    found: dict[str, Path] = {}
    for file, name, shape in _headers(Path(directory)):
        if name in found:
            raise SavedPortError(f"{file} holds `{name}`, which {found[name].name} holds too")
        if name not in known:
            raise SavedPortError(f"{file} holds `{name}`, which the port does not know")
        found[name] = file
        spec = specs.get(serving.aliases.get(name, name))
        if spec is None:
            continue
        expected = [*spec.shape, 2] if spec.is_complex() else [*spec.shape]
        if shape != expected:
            raise SavedPortError(f"`{name}` is {shape} in {file}; the port needs {expected}")
    missing = sorted(specs.keys() - {serving.aliases.get(n, n) for n in found})
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise SavedPortError(f"{directory} holds no values for `{missing[0]}`{more}")


def _specs(serving: ServingGraph) -> dict[str, torch.Tensor]:
    """Every tensor that the graphs read, without values."""
    parameters = {
        n: torch.empty(s, dtype=serving.dtype_of(n), device="meta")
        for n, s in serving.parameters.items()
    }
    return {**parameters, **serving.constants}


def _headers(directory: Path) -> Iterator[tuple[Path, str, list[int]]]:
    from safetensors import SafetensorError, safe_open

    for file in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as content:
                shapes = {n: list(content.get_slice(n).get_shape()) for n in content.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            raise SavedPortError(f"{file} cannot be read: {error}") from error
        for name, shape in shapes.items():
            yield file, name, shape


def _tensors(directory: Path, device: torch.device) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    found: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        try:
            found.update(load_file(file, device=str(device)))
        except (SafetensorError, OSError, ValueError) as error:
            raise SavedPortError(f"{file} cannot be read: {error}") from error
        except KeyError as error:
            raise SavedPortError(f"{file} holds a dtype that torch does not know") from error
    return found


def _fitting(name: str, tensor: torch.Tensor, spec: torch.Tensor) -> torch.Tensor:
    if spec.is_complex() and tensor.dtype == spec.dtype.to_real() and tensor.shape[-1:] == (2,):
        tensor = torch.view_as_complex(tensor.contiguous())  # saved as pairs of real numbers
    if tensor.shape != spec.shape or tensor.dtype != spec.dtype:
        raise SavedPortError(
            f"`{name}` is {tensor.dtype} {list(tensor.shape)} in the file; "
            f"the port needs {spec.dtype} {list(spec.shape)}"
        )
    return tensor
