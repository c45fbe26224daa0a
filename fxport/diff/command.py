"""``fxport diff A B``: two saved ports, read without running anything of theirs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx

from fxport.diff.record import GraphDiff
from fxport.errors import SavedPortError
from fxport.saved import DIGEST_KEY, GRAPH_FILE, own_dtype, read_config, read_serving
from fxport.serving import Part

__all__ = ["Side", "compare", "other_differences", "read_side", "rendered"]


@dataclass(frozen=True)
class Side:
    """One of the two things compared.

    Attributes:
        graphs: name of the part -> graph.
        config: sizes and names.
        files: the directory with the weights; None for a model that was captured here.
    """

    graphs: Mapping[str, fx.GraphModule | fx.Graph]
    config: Mapping[str, Any]
    files: Path | None


def read_side(directory: Path) -> Side:
    """A saved port.

    Raises:
        SavedPortError: it is none, or damaged.
    """
    from fxport.passes.tokens.rules import may_be_saved

    config = read_config(directory)
    dtype = own_dtype(directory, config)
    serving = read_serving(directory, may_be_saved, dtype, torch.device("cpu"))
    parts = {"embed": serving.embed, "body": serving.body, "head": serving.head}
    layers = {f"attention {i}": str(a) for i, a in enumerate(serving.attention)}
    if dtype == torch.float32 and "half" in json.loads((directory / GRAPH_FILE).read_bytes()):
        half = read_serving(directory, may_be_saved, torch.bfloat16, torch.device("cpu"))
        parts |= {"half embed": half.embed, "half body": half.body, "half head": half.head}
        layers |= {f"half attention {i}": str(a) for i, a in enumerate(half.attention)}
    # The digest is of the file: it changes with a line number in the user's code, too.
    config = {k: v for k, v in config.items() if k != DIGEST_KEY} | layers
    return Side({name: _named(part) for name, part in parts.items()}, config, directory)


def _named(part: Part) -> fx.Graph:
    """Placeholders say which parameter they are."""
    from fxport.capture.inputs import GraphInput, InputKind

    for node in part.graph.nodes:
        name = part.weights.get(node.name)
        if node.op == "placeholder" and name is not None:
            node.meta["input"] = GraphInput(InputKind.PARAMETER, name)
    return part.graph


def compare(one: Side, other: Side) -> dict[str, GraphDiff]:
    """A diff per part. Parts that only one side has are compared with an empty graph."""
    names = dict.fromkeys([*one.graphs, *other.graphs])
    empty = fx.Graph()
    return {
        n: GraphDiff.between(one.graphs.get(n, empty), other.graphs.get(n, empty)) for n in names
    }


def other_differences(one: Side, other: Side) -> list[str]:
    """Configuration and weights: names and shapes, and how many values differ."""
    lines = [
        f"config {key}: {one.config.get(key)} -> {other.config.get(key)}"
        for key in sorted({*one.config, *other.config})
        if one.config.get(key) != other.config.get(key)
    ]
    if one.files is None or other.files is None:
        return lines
    ours, theirs = _weights(one.files), _weights(other.files)
    lines += [f"weight {n}: only in the first" for n in sorted(ours.keys() - theirs.keys())]
    lines += [f"weight {n}: only in the second" for n in sorted(theirs.keys() - ours.keys())]
    values = 0
    for name in sorted(ours.keys() & theirs.keys()):
        a, b = ours[name], theirs[name]
        if a.shape != b.shape or a.dtype != b.dtype:
            lines.append(f"weight {name}: {a.dtype} {[*a.shape]} -> {b.dtype} {[*b.shape]}")
        elif not torch.equal(a, b):
            values += 1
    if values:
        lines.append(f"values differ in {values} weights of the same name and shape")
    return lines


def _weights(directory: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    found: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        try:
            found.update(load_file(file))
        except SafetensorError as error:
            raise SavedPortError(f"{file} cannot be read: {error}") from error
    return found


def rendered(diffs: Mapping[str, GraphDiff], others: list[str], how: str) -> str:
    """All parts as one text; `how` is ``"table"``, ``"text"`` or ``"json"``."""
    if how == "json":
        parts = {name: diff.to_dict() for name, diff in diffs.items()}
        return json.dumps({"graphs": parts, "other": others}, indent=1)
    shown = [
        f"{name}: {diff.text() if how == 'text' else diff.table()}" for name, diff in diffs.items()
    ]
    return "\n\n".join([*shown, *others])
