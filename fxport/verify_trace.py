"""The first operation at which two runs of a port part, found by comparing every value."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from fxport.capture.location import module_of
from fxport.errors import FxportError
from fxport.loading import Loaded
from fxport.verify_records import FirstDifference

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["first_in_engine", "first_in_graph", "first_in_weights"]


def first_in_weights(loaded: Loaded, parameters: Mapping[str, Tensor]) -> FirstDifference | None:
    """The first parameter that is not the model's."""
    between = "saved weights and the model's"
    for name, saved in loaded.parameters.items():
        own = parameters.get(loaded.serving.aliases.get(name, name))
        if own is None:
            return FirstDifference(between, name, detail="the model has no such parameter")
        if own.shape != saved.shape or own.dtype != saved.dtype:
            detail = f"{own.dtype} {list(own.shape)} in the model"
            return FirstDifference(between, name, detail=detail)
    for name, saved in loaded.parameters.items():
        own = parameters[loaded.serving.aliases.get(name, name)]
        if not torch.equal(own.detach().cpu(), saved.cpu()):
            count = int((own.detach().cpu() != saved.cpu()).sum())
            return FirstDifference(between, name, detail=f"{count} of {own.numel()} values differ")
    return None


def first_in_graph(loaded: Loaded, fresh: Any) -> FirstDifference | None:
    """The first operation of the saved graph that a fresh port of the model does not have.

    Args:
        fresh: the `ServingGraph` of that port.
    """
    from fxport.diff.record import Change, GraphDiff

    for name in ("embed", "body", "head"):
        one, other = getattr(fresh, name).graph, getattr(loaded.serving, name).graph
        for row in GraphDiff.between(one, other).rows:
            if row.change is Change.KEPT:
                continue
            found = row.after or row.before
            assert found is not None
            new = f"in a new port: {row.before}" if row.before else "not in a new port"
            detail = new if row.after else "missing in the saved graph"
            return FirstDifference(
                "saved graph and a new port", found.node.name, found.target, found.module, detail
            )
    return None


def first_in_engine(loaded: Loaded, prompt: Sequence[int], file: Path) -> FirstDifference | None:
    """The first operation whose value in the engine is not that of the graph in PyTorch.

    Linear layers are the engine's own, maybe joined; what comes after them is compared.

    Args:
        file: values recorded by `fxport.backends.vllm.probe`, ``"3:body.view_2" -> tensor``;
            attention calls are ``body.attention_0`` and so on.

    Raises:
        FxportError: no value of the two can be paired.
    """
    from safetensors.torch import load_file

    from fxport.backends.torch import ROUNDING, relative_error

    found = {key.partition(":")[2]: value for key, value in load_file(file).items()}
    bound = ROUNDING * torch.finfo(loaded.serving.dtype).eps
    paired = 0
    for name, node, value in _values(loaded, prompt):
        other = found.get(name)
        if other is None:
            continue  # a linear layer that the engine joins with its siblings
        paired += 1
        error = relative_error(other, value)
        if not error <= bound:
            detail = f"relative difference {error:.1e}, rounding would be below {bound:.1e}"
            between = "graph in PyTorch and the engine"
            return FirstDifference(between, node.name, str(node.target), module_of(node), detail)
    if not paired:
        raise FxportError("the engine runs other operations than the graph: nothing to compare")
    return None


def _values(loaded: Loaded, prompt: Sequence[int]) -> Iterator[tuple[str, fx.Node, Tensor]]:
    """(``"body.view_2"``, node, value) in order, for one sequence."""
    serving = loaded.serving
    weights = {**loaded.parameters, **serving.constants}
    ids = torch.tensor([list(prompt)])
    seen: dict[fx.Node, Tensor] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if isinstance(result, torch.Tensor) and n.op == "call_function":
                seen[n] = result
            return result

    inputs = {"input_ids": ids, "positions": torch.arange(len(prompt))}
    for label in ("embed", "body"):
        part = getattr(serving, label)
        seen.clear()
        given = {**inputs, **{node: weights[name] for node, name in part.weights.items()}}
        names = [n.name for n in part.graph.nodes if n.op == "placeholder"]
        gm = fx.GraphModule(nn.Module(), part.graph)
        with torch.no_grad():
            result = Recorder(gm).run(*(given[name] for name in names))
        inputs["embeddings"] = result
        originals = {n.name: n for n in part.graph.nodes}
        attentions = 0
        for node, value in seen.items():
            own = originals[node.name]
            name = own.name
            if _is_attention_output(own):
                name = f"attention_{attentions}"
                attentions += 1
            yield f"{label}.{name}", own, torch.view_as_real(value) if value.is_complex() else value


def _is_attention_output(node: fx.Node) -> bool:
    source = node.args[0] if node.target is operator.getitem else None
    return isinstance(source, fx.Node) and source.target is torch.ops.fxport.attention.default
