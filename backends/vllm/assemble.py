"""Turns the parts of a saved port into modules that hold vLLM's layers.

Before (a part)                              After (a GraphModule in vLLM)
    fxport.attention(q, k, v, ...)               call_module attention_3(q, k, v)
    linear(x, w7, w8)                            call_module linears.blocks.0.mlp.up(x)
    embedding(w0, input_ids)                     embedding(get_attr weights.wte.weight, input_ids)
"""

from __future__ import annotations

import operator
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import fx, nn
from vllm.config import VllmConfig

import fxport.ops.attention  # noqa: F401  (registers the op)
from fxport.backends.vllm.layers import Linear, PagedAttention
from fxport.capture.arguments import arguments
from fxport.errors import FxportError, SavedPortError
from fxport.serving import Part, ServingGraph

__all__ = ["Assembled", "assemble"]

aten = torch.ops.aten
_ATTENTION = torch.ops.fxport.attention.default


@dataclass(frozen=True)
class Assembled:
    """The runnable parts, and where each checkpoint tensor goes.

    Attributes:
        embed, body, head: modules with vLLM's layers inside.
        targets: checkpoint name -> tensors (parameters or buffers) that it fills.
    """

    embed: fx.GraphModule
    body: fx.GraphModule
    head: fx.GraphModule
    targets: dict[str, list[torch.Tensor]]


@dataclass
class _Builder:
    serving: ServingGraph
    vllm_config: VllmConfig
    prefix: str
    root: nn.Module = field(default_factory=nn.Module)
    targets: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    attention_count: int = 0

    def __post_init__(self) -> None:
        parts = (self.serving.embed, self.serving.body, self.serving.head)
        self.uses = Counter(
            part.weights[node.name]
            for part in parts
            for node in part.graph.nodes
            if node.name in part.weights
            for _ in node.users
        )

    def module(self, part: Part) -> fx.GraphModule:
        for node in list(part.graph.nodes):
            if node.target is _ATTENTION:
                self._attention(part.graph, node)
            elif node.target is aten.linear.default:
                self._linear(part, node)
        for node in list(part.graph.nodes):
            if node.name in part.weights and node.op == "placeholder":
                self._weight(part, node)
        part.graph.lint()
        return fx.GraphModule(self.root, part.graph)

    def _attention(self, graph: fx.Graph, node: fx.Node) -> None:
        index = self.attention_count
        self.attention_count += 1
        layer = self.serving.attention[index]
        bound = arguments(node)
        name = f"attention_{index}"
        # vLLM finds a layer's number as the only integer in its prefix.
        prefix = f"{self.prefix}.layers.{index}.attn".lstrip(".")
        sinks = None if layer.sinks is None else self._parameter(layer.sinks)
        self.root.add_module(name, PagedAttention(layer, sinks, self.vllm_config, prefix))
        with graph.inserting_before(node):
            new = graph.call_module(name, (bound["q"], bound["k"], bound["v"]))
        for user in list(node.users):
            if user.target is not operator.getitem or user.args[1] != 0:
                raise SavedPortError("the graph uses more of attention than its output")
            user.replace_all_uses_with(new)
            graph.erase_node(user)
        graph.erase_node(node)

    def _linear(self, part: Part, node: fx.Node) -> None:
        """A linear layer of its own weight becomes vLLM's; a shared weight stays a tensor."""
        bound = arguments(node)
        weight, bias = bound["weight"], bound["bias"]
        names = [part.weights.get(n.name) for n in (weight, bias) if n is not None]
        if any(name is None or self.uses[name] != 1 for name in names):
            return
        owner = names[0].rpartition(".")[0]  # type: ignore[union-attr]
        if not owner or names[0] not in self.serving.parameters:
            return
        out_features, in_features = self.serving.parameters[names[0]]  # type: ignore[index]
        linear = Linear(
            out_features, in_features, bias is not None, self.vllm_config, f"{self.prefix}.{owner}"
        )
        path = f"linears.{owner}"
        _add(self.root, path, linear)
        filled = dict(linear.linear.named_parameters())
        for name, own in zip(names, ("weight", "bias"), strict=False):
            self.targets[name] = [filled[own]]  # type: ignore[index]
        with part.graph.inserting_before(node):
            new = part.graph.call_module(path, (bound["input"],))
        node.replace_all_uses_with(new)
        part.graph.erase_node(node)

    def _weight(self, part: Part, node: fx.Node) -> None:
        """A tensor that the graph reads directly; a placeholder nobody reads is dropped."""
        name = part.weights[node.name]
        if node.users:
            self._held(name)
            with part.graph.inserting_before(node):
                node.replace_all_uses_with(part.graph.get_attr(f"weights.{name}"))
        part.graph.erase_node(node)

    def _parameter(self, name: str) -> nn.Parameter:
        if name not in self.serving.parameters:
            raise SavedPortError(f"`{name}` is not a parameter of the port")
        held = self._held(name)
        assert isinstance(held, nn.Parameter)
        return held

    def _held(self, name: str) -> torch.Tensor:
        """The one tensor of this name, made at its first use."""
        if name not in self.targets:
            tensor = self._tensor(name)
            _add(self.root, f"weights.{name}", tensor)
            self.targets[name] = [tensor]
        return self.targets[name][0]

    def _tensor(self, name: str) -> torch.Tensor:
        if name in self.serving.parameters:
            return nn.Parameter(torch.empty(self.serving.parameters[name]), requires_grad=False)
        if name not in self.serving.constants:
            raise SavedPortError(f"the graph reads `{name}`, which the port does not have")
        # Constants keep the dtype they were captured in, whatever vLLM's default dtype is.
        spec = self.serving.constants[name]
        return torch.empty(spec.shape, dtype=spec.dtype)


def _add(root: nn.Module, path: str, value: nn.Module | torch.Tensor) -> None:
    *parents, last = path.split(".")
    for name in parents:
        if name not in root._modules:
            root.add_module(name, nn.Module())
        root = root.get_submodule(name)
    if isinstance(value, nn.Module):
        root.add_module(last, value)
    elif isinstance(value, nn.Parameter):
        root.register_parameter(last, value)
    else:
        root.register_buffer(last, value, persistent=False)


def assemble(serving: ServingGraph, vllm_config: VllmConfig, prefix: str) -> Assembled:
    """Builds the three modules; parameters are uninitialised, in vLLM's default dtype.

    Raises:
        FxportError: a parallel layout that a port cannot be served with.
        SavedPortError: the graphs do not fit their record.
    """
    parallel = vllm_config.parallel_config
    if parallel.tensor_parallel_size != 1 or parallel.pipeline_parallel_size != 1:
        raise FxportError(
            "a port is served with tensor_parallel_size=1 and pipeline_parallel_size=1, not "
            f"{parallel.tensor_parallel_size} and {parallel.pipeline_parallel_size}"
        )
    builder = _Builder(serving, vllm_config, prefix)
    embed = builder.module(serving.embed)
    body = builder.module(serving.body)
    head = builder.module(serving.head)
    if builder.attention_count != len(serving.attention):
        raise SavedPortError("the record of attention layers does not fit the graph")
    return Assembled(embed, body, head, builder.targets)
