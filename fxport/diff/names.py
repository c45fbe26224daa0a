"""Names of nodes that survive unrelated changes: no shapes, no counters over the whole graph.

``blocks.3.attn/linear#2`` is the second linear of the module ``blocks.3.attn``. Batch size and
length are ``B`` and ``T``, whether the graph has symbols for them or plain numbers.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fxport.capture.inputs import GraphInput, InputKind
from fxport.capture.location import module_of

__all__ = [
    "Sizes",
    "argument_text",
    "arguments_text",
    "module_near",
    "node_text",
    "op_name",
    "sizes_of",
    "stable_names",
    "target_text",
    "value_text",
]

_SYMBOL = re.compile(r"\b[su]\d+\b")
_LETTERS = ("B", "T", "S", "R", "P", "Q", "U", "W")


@dataclass(frozen=True)
class Sizes:
    """What batch size and length are called.

    Attributes:
        letters: symbol -> letter, ``{"s27": "B"}``.
        batch, length: plain numbers; None where they are symbols, 1 or unknown.
    """

    letters: Mapping[str, str] = field(default_factory=dict)
    batch: int | None = None
    length: int | None = None

    def renamed(self, text: object) -> str:
        """An expression over symbols, with letters."""
        return _SYMBOL.sub(lambda m: self.letters.get(m[0], m[0]), str(text))


def sizes_of(graph: fx.Graph) -> Sizes:
    """From the inputs that are neither parameters nor buffers.

    The first dimension is the batch, the second of token ids ``[B, T]`` or of features
    ``[B, T, C]`` the length.
    """
    letters: dict[str, str] = {}
    plain: list[int | None] = [None, None]
    for value in _data(graph):
        for place, size in enumerate(value.shape):
            sequence = value.dim() == 3 or (value.dim() == 2 and not value.is_floating_point())
            if isinstance(size, torch.SymInt):
                for symbol in _SYMBOL.findall(str(size)):
                    letters.setdefault(symbol, _letter(place, letters))
            elif place < 2 and sequence and plain[place] is None and size > 1:
                plain[place] = size
    return Sizes(letters, *plain)


def _data(graph: fx.Graph) -> list[torch.Tensor]:
    """Fake values of the inputs that a caller passes."""
    found = []
    for node in graph.find_nodes(op="placeholder"):
        known, value = node.meta.get("input"), node.meta.get("val")
        data = not isinstance(known, GraphInput) or known.kind is InputKind.DATA
        if data and isinstance(value, torch.Tensor):
            found.append(value)
    return found


def _letter(place: int, letters: Mapping[str, str]) -> str:
    free = [letter for letter in _LETTERS if letter not in letters.values()]
    if place < 2 and _LETTERS[place] in free:
        return _LETTERS[place]
    rest = [letter for letter in free if letter not in ("B", "T")]
    return rest[0] if rest else f"D{len(letters)}"


def stable_names(graph: fx.Graph) -> dict[fx.Node, str]:
    """One name per node, in graph order."""
    names: dict[fx.Node, str] = {}
    counts: Counter[str] = Counter()
    modules: dict[fx.Node, str] = {}
    for node in graph.nodes:
        base = _base(node, modules)
        counts[base] += 1
        names[node] = base if counts[base] == 1 else f"{base}#{counts[base]}"
    return names


def module_near(node: fx.Node, known: dict[fx.Node, str]) -> str:
    """The user's module of a node; a node that a pass made belongs where its inputs do."""
    if node not in known:
        inputs = [known.get(n, "") for n in node.all_input_nodes if n.op != "placeholder"]
        known[node] = _own_module(node) or next((m for m in reversed(inputs) if m), "")
    return known[node]


def _own_module(node: fx.Node) -> str:
    """A size that export reads off an input is in no module, but has a stack of this name."""
    found = module_of(node)
    return "" if found == "_empty_nn_module_stack_from_metadata_hook" else found


def op_name(target: Any) -> str:
    """``softmax`` for ``aten.softmax.int``."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target._schema.name.split("::")[-1])
    return str(getattr(target, "__name__", target))


def target_text(node: fx.Node) -> str:
    """``aten.softmax.int``; the qualified name for an input."""
    known = node.meta.get("input")
    if isinstance(known, GraphInput):
        return known.name
    if isinstance(node.target, torch._ops.OpOverload | str):
        return str(node.target)
    return op_name(node.target)


def argument_text(value: Any, names: dict[fx.Node, str]) -> str:
    """An argument with nodes under their stable names."""
    if isinstance(value, fx.Node):
        return names[value]
    if isinstance(value, list | tuple):
        return f"[{', '.join(argument_text(v, names) for v in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{k}: {argument_text(v, names)}' for k, v in value.items())}}}"
    return repr(value)


def arguments_text(node: fx.Node, names: dict[fx.Node, str], sizes: Sizes) -> str:
    """All arguments; plain batch sizes and lengths, where a shape is asked for, as letters."""
    schema = getattr(node.target, "_schema", None)
    known = [a.name for a in schema.arguments] if schema is not None else []
    bound = [*zip([*known, *[""] * len(node.args)], node.args, strict=False)]
    bound += node.kwargs.items()
    shown = [argument_text(_lettered(name, value, sizes), names) for name, value in bound]
    positional = shown[: len(node.args)]
    keywords = zip(node.kwargs, shown[len(node.args) :], strict=True)
    return ", ".join([*positional, *(f"{key}={text}" for key, text in keywords)])


class _Letter(str):
    """Printed without quotes."""

    def __repr__(self) -> str:
        return str(self)


def _lettered(name: str, value: Any, sizes: Sizes) -> Any:
    if name in ("size", "shape") and isinstance(value, list | tuple):
        return [_dimension(place, size, sizes) for place, size in enumerate(value)]
    if name == "end" and value == sizes.length and isinstance(value, int):
        return _Letter("T")
    return value


def _dimension(place: int, size: Any, sizes: Sizes) -> Any:
    """The batch stands first, the length behind it or, of a mask ``[T, T]``, first as well."""
    if type(size) is not int:
        return size
    batch, length = sizes.batch, sizes.length
    if place == 0 and batch is not None and size == batch:
        return _Letter("B")
    if length is not None and size == length:
        return _Letter("T")
    if place == 0 and batch is not None and length is not None and size == batch * length:
        return _Letter("B*T")
    return size


def value_text(value: Any, sizes: Sizes) -> str:
    """``float32[B, T, 64]``."""
    if isinstance(value, torch.Tensor):
        shape = ", ".join(sizes.renamed(s) for s in value.shape)
        return f"{str(value.dtype).removeprefix('torch.')}[{shape}]"
    if isinstance(value, tuple | list):
        return f"({', '.join(value_text(v, sizes) for v in value)})"
    return "" if value is None else sizes.renamed(value)


def node_text(op: str, name: str, target: str, arguments: str) -> str:
    """One line; `op` is the fx kind."""
    if op == "placeholder":
        return f"input {name}"
    if op == "output":
        return f"return {arguments}"
    return f"{name} = {target}({arguments})"


def _base(node: fx.Node, modules: dict[fx.Node, str]) -> str:
    if node.op == "output":
        return "output"
    if node.op in ("placeholder", "get_attr"):
        return target_text(node)
    module = module_near(node, modules)
    return f"{module}/{op_name(node.target)}" if module else op_name(node.target)
