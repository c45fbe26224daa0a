"""Turns the parts of a saved port into modules that hold vLLM's layers, for this rank.

Before (a part of a rank)                    After (a GraphModule in vLLM)
    fxport.attention(q, k, v, ...)               call_module attention_3(q, k, v, p)  its heads
    linear(x, w7, w8)                            call_module linears.blocks.0.mlp.up.weight(x)
    reduce_from(linear(x, w9)) + w10             call_module linears.blocks.0.mlp.down.weight(x)
    reduce_from(<rows of w0 looked up>)          call_module embeddings.wte.weight(input_ids)
    gather(linear(x, w0))                        call_module heads.wte.weight(x)
    stack([w11, w12, w13])                       get_attr stacks.experts.0.up.weight
    embedding(w1, positions)                     embedding(get_attr weights.wpe.weight, positions)
"""

from __future__ import annotations

import dataclasses
import operator
import weakref
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from vllm.config import VllmConfig
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    get_tp_group,
)
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

import fxport.ops.attention  # noqa: F401  (registers the op)
from fxport.backends.vllm.layers import PagedAttention
from fxport.backends.vllm.linears import (
    AllGather,
    AllReduce,
    Head,
    linear_layer,
    vocabulary_layer,
)
from fxport.backends.vllm.siblings import (
    Joined,
    Sibling,
    replace_siblings,
    sibling_groups,
)
from fxport.backends.vllm.targets import Target
from fxport.capture.arguments import arguments
from fxport.errors import FxportError, SavedPortError
from fxport.nested import attach
from fxport.parallel.context import ParallelContext
from fxport.parallel.modules import Gather, ReduceFrom
from fxport.parallel.plan import ParameterShard, Plan
from fxport.passes.held_as_read import hold_as_read
from fxport.passes.tensor_parallel.boxes import Box
from fxport.passes.tensor_parallel.emission import LocalHeads
from fxport.passes.tensor_parallel.serving import (
    RankPart,
    RankServing,
    divide_serving,
    whole_serving,
)
from fxport.passes.tensor_parallel.taken import constant_index
from fxport.serving import ServingGraph

__all__ = ["Assembled", "assemble"]

aten = torch.ops.aten
_ATTENTION = torch.ops.fxport.attention.default


@dataclass(frozen=True)
class Assembled:
    """The runnable parts, and where each checkpoint tensor goes.

    Attributes:
        embed, body, head: modules with vLLM's layers inside.
        targets: checkpoint name -> tensors that it fills.
        plan: how the weights are divided; None on one rank.
    """

    embed: fx.GraphModule
    body: fx.GraphModule
    head: fx.GraphModule
    targets: dict[str, list[Target]]
    plan: Plan | None


@dataclass
class _Builder:
    rank: RankServing
    vllm_config: VllmConfig
    prefix: str
    root: nn.Module = field(default_factory=nn.Module)
    targets: dict[str, list[Target]] = field(default_factory=dict)
    held: dict[str, torch.Tensor] = field(default_factory=dict)
    embeddings: dict[str, VocabParallelEmbedding] = field(default_factory=dict)
    attention_count: int = 0

    def __post_init__(self) -> None:
        self.serving: ServingGraph = self.rank.serving
        parts = (self.rank.embed, self.rank.body, self.rank.head)
        self.uses: Counter[str] = Counter(
            part.part.weights[node.name]
            for part in parts
            for node in part.part.graph.nodes
            if node.name in part.part.weights
            for _ in node.users
        )
        self.vocabulary: Counter[str] = Counter(
            name for part in parts for name in _vocabulary_names(part)
        )

    def module(self, source: RankPart) -> fx.GraphModule:
        graph = source.part.graph
        nodes = list(graph.nodes)
        # Quantised layers load by rules of their own, and a rank's layers are divided by theirs.
        if self.rank.plan is None and self.vllm_config.quant_config is None:
            for group in sibling_groups(graph, lambda n: self._own(source, n), _ATTENTION):
                self._join(graph, group)
        for node in nodes:
            if node.target is _ATTENTION:
                self._attention(graph, node, source.heads[node])
            elif node in source.lookups:
                self._lookup(source, node)
            elif node.op == "call_module":
                self._collective(source, node)
            elif node.target is constant_index:
                self._constant(graph, node)
        graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
        for node in list(graph.nodes):
            if node.target is aten.linear.default:
                self._linear(source, node)
        for node in list(graph.nodes):
            if node.target is aten.stack.default:
                self._stack(source, node)
        for node in list(graph.nodes):
            if node.name in source.part.weights and node.op == "placeholder":
                self._weight(source, node)
        graph.lint()
        return fx.GraphModule(self.root, graph)

    # -- what replaces nodes -------------------------------------------------------------------

    def _attention(self, graph: fx.Graph, node: fx.Node, heads: LocalHeads) -> None:
        index = self.attention_count
        self.attention_count += 1
        whole = self.serving.attention[index]
        slopes = whole.alibi_slopes
        layer = dataclasses.replace(
            whole,
            num_heads=len(heads.query),
            num_kv_heads=heads.kv,
            alibi_slopes=None if slopes is None else tuple(slopes[h] for h in heads.query),
        )
        bound = arguments(node)
        name = f"attention_{index}"
        # vLLM finds a layer's number as the only integer in its prefix.
        prefix = f"{self.prefix}.layers.{index}.attn".lstrip(".")
        sinks = None if layer.sinks is None else self._sinks(layer.sinks, heads)
        self.root.add_module(name, PagedAttention(layer, sinks, self.vllm_config, prefix))
        positions = next(n for n in graph.find_nodes(op="placeholder") if n.name == "positions")
        with graph.inserting_before(node):
            new = graph.call_module(name, (bound["q"], bound["k"], bound["v"], positions))
        for user in list(node.users):
            if user.target is not operator.getitem or user.args[1] != 0:
                raise SavedPortError("the graph uses more of attention than its output")
            user.replace_all_uses_with(new)
            graph.erase_node(user)
        graph.erase_node(node)

    def _sinks(self, found: str | tuple[float, ...], heads: LocalHeads) -> torch.Tensor:
        if isinstance(found, tuple):  # no parameter: vLLM would wait for its weights
            return torch.tensor([found[h] for h in heads.query])
        if found not in self.serving.parameters:
            raise SavedPortError(f"`{found}` is not a parameter of the port")
        shape = list(self._shape(found))  # of one dimension that counts: `passes.split`
        box: list[tuple[int, ...] | None] = [None] * len(shape)
        dim = shape.index(max(shape))
        shape[dim], box[dim] = len(heads.query), heads.query
        held = nn.Parameter(torch.empty(shape, dtype=self.serving.dtype_of(found)), False)
        self._fill(found, held, tuple(box))
        return held

    def _lookup(self, source: RankPart, node: fx.Node) -> None:
        """A vocabulary that is only looked up and projected on; any other stays a tensor."""
        weight, tokens = source.lookups[node]
        name = source.part.weights[weight.name]
        if not self._only_vocabulary(name):
            self._collective(source, node)
            return
        path = f"embeddings.{name}"
        if name not in self.embeddings:
            layer = vocabulary_layer(
                self._shard(name),
                self.serving.dtype_of(name),
                self.vllm_config,
                f"{self.prefix}.{_owner(name)}",
            )
            self.embeddings[name] = layer
            attach(self.root, path, layer)
            self._fill(name, layer.get_parameter("weight"), None)
        self._call(source, node, path, tokens)

    def _collective(self, source: RankPart, node: fx.Node) -> None:
        module = source.modules[str(node.target)]
        value = node.args[0]
        assert isinstance(value, fx.Node)
        if isinstance(module, ReduceFrom):
            if value.target is not aten.linear.default or not self._row(source, node, value):
                self._replace_module(node, AllReduce())
        elif isinstance(module, Gather):
            if value.target is not aten.linear.default or not self._head(source, node, value):
                self._replace_module(node, AllGather(module.sizes))
        else:
            raise FxportError(f"no collective of vLLM for {type(module).__name__}")

    def _replace_module(self, node: fx.Node, module: nn.Module) -> None:
        path = f"collectives.c{len(list(self.root.modules()))}"
        attach(self.root, path, module)
        node.target = path

    def _head(self, source: RankPart, node: fx.Node, linear: fx.Node) -> bool:
        bound = arguments(linear)
        names = [source.part.weights.get(n.name) for n in (bound["weight"], bound["bias"]) if n]
        weight, bias = names[0], names[1] if len(names) > 1 else None
        if weight is None or not self._only_vocabulary(weight) or len(linear.users) != 1:
            return False
        if bound["bias"] is not None and (bias is None or self.uses[bias] != 1):
            return False
        path, tied = f"heads.{weight}", self.embeddings.get(weight)
        prefix = f"{self.prefix}.{_owner(weight)}"
        dtype = self.serving.dtype_of(weight)
        head = Head(self._shard(weight), dtype, bias is not None, tied, self.vllm_config, prefix)
        attach(self.root, path, head)
        if tied is None:
            self._fill(weight, head.lm_head.get_parameter("weight"), None)
        if bias is not None:
            self._fill(bias, head.lm_head.get_parameter("bias"), None)
        self._call(source, node, path, bound["input"])
        return True

    def _row(self, source: RankPart, reduce: fx.Node, linear: fx.Node) -> bool:
        """``reduce_from(linear(x, w)) + b``; the bias joins where it is this layer's own."""
        bound = arguments(linear)
        name = self._own(source, bound["weight"])
        if name is None or len(linear.users) != 1:
            return False
        result, bias = reduce, None
        (user, *others) = reduce.users
        if not others and user.target is aten.add.Tensor and user.args[0] is reduce:
            added = user.args[1]
            bias = self._own(source, added) if isinstance(added, fx.Node) else None
            if bias is not None and self.serving.parameters[bias] == self._shape(name)[:1]:
                result = user
            else:
                bias = None
        self._layer(source, result, bound["input"], name, bias)
        return True

    def _join(self, graph: fx.Graph, group: list[Sibling]) -> None:
        shapes = [self._shape(sibling.weight) for sibling in group]
        prefix = f"{self.prefix}.{_owner(group[0].weight)}"
        dtype = self.serving.dtype_of(group[0].weight)
        joined = Joined(shapes, dtype, group[0].bias is not None, self.vllm_config, prefix)
        path = f"siblings.s{len(list(self.root.modules()))}"
        attach(self.root, path, joined)
        for name, tensor, rows in joined.filled_by(group):
            self._fill(name, tensor, None, rows)
        replace_siblings(graph, group, path)

    def _linear(self, source: RankPart, node: fx.Node) -> None:
        """A linear layer of its own weight becomes vLLM's; a shared weight stays a tensor."""
        bound = arguments(node)
        weight, bias = self._own(source, bound["weight"]), self._own(source, bound["bias"])
        if weight is None or (bound["bias"] is not None and bias is None):
            return
        self._layer(source, node, bound["input"], weight, bias)

    def _layer(
        self, source: RankPart, node: fx.Node, value: fx.Node, weight: str, bias: str | None
    ) -> None:
        owner = _owner(weight)
        linear = linear_layer(
            self._shard(weight),
            self.serving.dtype_of(weight),
            bias is not None,
            self.rank.context.rank,
            self.serving.attention,
            self.vllm_config,
            f"{self.prefix}.{owner}",
        )
        path = f"linears.{weight}"  # its owner may have children, and those layers of their own
        attach(self.root, path, linear)
        filled = dict(linear.linear.named_parameters())
        self._fill(weight, filled["weight"], linear.boxes["weight"])
        if bias is not None:
            self._fill(bias, filled["bias"], linear.boxes["bias"])
        self._call(source, node, path, value)

    def _call(self, source: RankPart, node: fx.Node, path: str, value: fx.Node) -> None:
        graph = source.part.graph
        with graph.inserting_before(node):
            new = graph.call_module(path, (value,))
        node.replace_all_uses_with(new)
        graph.erase_node(node)

    def _constant(self, graph: fx.Graph, node: fx.Node) -> None:
        """An index vector, made once: vLLM's CUDA graphs cannot copy it from the host."""
        index: Any = node.args[0]
        path = f"indices.i{len(list(self.root.buffers()))}"
        attach(self.root, path, torch.tensor(index))
        with graph.inserting_before(node):
            node.replace_all_uses_with(graph.get_attr(path))
        graph.erase_node(node)

    # -- weights -------------------------------------------------------------------------------

    def _only_vocabulary(self, name: str) -> bool:
        return self.uses[name] == self.vocabulary[name]

    def _own(self, source: RankPart, node: fx.Node | None) -> str | None:
        """The name of a parameter that a module has and nothing else uses."""
        name = None if node is None else source.part.weights.get(node.name)
        if name is None or self.uses[name] != 1 or name not in self.serving.parameters:
            return None
        return name if _owner(name) else None

    def _shape(self, name: str) -> tuple[int, ...]:
        return self.serving.parameters[name]

    def _shard(self, name: str) -> ParameterShard:
        if self.rank.plan is not None:
            return self.rank.plan.shard(name)
        shape = self._shape(name)
        return ParameterShard(name, shape, "replicated", ((None,) * len(shape),))

    def _fill(
        self, name: str, tensor: torch.Tensor, box: Box | None, rows: slice | int | None = None
    ) -> None:
        self.targets.setdefault(name, []).append(
            Target(weakref.ref(tensor), self._shape(name), box, rows)
        )

    def _stack(self, source: RankPart, node: fx.Node) -> None:
        """Parameters that are only read stacked (of experts) are loaded into one tensor."""
        bound = arguments(node)
        names = [source.part.weights.get(n.name, "") for n in bound["tensors"]]
        once = all(n in self.serving.parameters and self.uses[n] == 1 for n in names)
        dtypes = {self.serving.dtype_of(n) for n in names}
        if bound["dim"] != 0 or not once or len(set(names)) < len(names) or len(dtypes) > 1:
            return
        rank, graph = self.rank.context.rank, source.part.graph
        local = self._shard(names[0]).local_shape(rank)
        stacked = torch.empty(len(names), *local, dtype=dtypes.pop())
        tensor = nn.Parameter(stacked, requires_grad=False)
        path = f"stacks.{names[0]}"
        attach(self.root, path, tensor)
        for index, name in enumerate(names):
            self._fill(name, tensor, self._shard(name).indices[rank], index)
        with graph.inserting_before(node):
            node.replace_all_uses_with(graph.get_attr(path))
        graph.erase_node(node)

    def _weight(self, source: RankPart, node: fx.Node) -> None:
        """A tensor that the graph reads directly; a placeholder nobody reads is dropped."""
        name = source.part.weights[node.name]
        graph = source.part.graph
        if node.users:
            self._hold(name)
            with graph.inserting_before(node):
                node.replace_all_uses_with(graph.get_attr(f"weights.{name}"))
        graph.erase_node(node)

    def _hold(self, name: str) -> None:
        if name in self.held:
            return
        tensor = self._tensor(name)
        self.held[name] = tensor
        attach(self.root, f"weights.{name}", tensor)
        if name in self.serving.parameters:
            self._fill(name, tensor, self._shard(name).indices[self.rank.context.rank])
        else:
            self.targets.setdefault(name, []).append(
                Target(weakref.ref(tensor), tuple(tensor.shape), None)
            )

    def _tensor(self, name: str) -> torch.Tensor:
        if name in self.serving.parameters:
            local = self._shard(name).local_shape(self.rank.context.rank)
            held = torch.empty(local, dtype=self.serving.dtype_of(name))
            return nn.Parameter(held, requires_grad=False)
        if name not in self.serving.constants:
            raise SavedPortError(f"the graph reads `{name}`, which the port does not have")
        # Constants keep the dtype they were captured in, whatever vLLM's default dtype is.
        spec = self.serving.constants[name]
        return torch.empty(spec.shape, dtype=spec.dtype)


def _vocabulary_names(part: RankPart) -> list[str]:
    """Weights by name, once for each look-up and for each gathered projection."""
    found = [weight.name for weight, _ in part.lookups.values()]
    for node in part.part.graph.nodes:
        if node.op == "call_module" and isinstance(part.modules[str(node.target)], Gather):
            value = node.args[0]
            if value.target is aten.linear.default:
                found.append(arguments(value)["weight"].name)
    return [part.part.weights[name] for name in found if name in part.part.weights]


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def assemble(serving: ServingGraph, vllm_config: VllmConfig, prefix: str) -> Assembled:
    """Builds the three modules; parameters are uninitialised, in the port's dtypes.

    Raises:
        FxportError: a parallel layout that a port cannot be served with.
        SavedPortError: the graphs do not fit their record.
    """
    _check_layout(vllm_config)
    serving = hold_as_read(serving)
    ranks = get_tensor_model_parallel_world_size()
    if ranks == 1:
        rank = whole_serving(serving)
    else:
        group = get_tp_group().device_group
        context = ParallelContext(get_tensor_model_parallel_rank(), ranks, group)
        rank = divide_serving(serving, context, torch.get_default_device())
    builder = _Builder(rank, vllm_config, prefix)
    embed = builder.module(rank.embed)
    body = builder.module(rank.body)
    head = builder.module(rank.head)
    if builder.attention_count != len(serving.attention):
        raise SavedPortError("the record of attention layers does not fit the graph")
    return Assembled(embed, body, head, builder.targets, rank.plan)


def _check_layout(vllm_config: VllmConfig) -> None:
    parallel = vllm_config.parallel_config
    others = ("pipeline_parallel_size", "decode_context_parallel_size",
              "prefill_context_parallel_size")  # fmt: skip
    for name in others:
        if getattr(parallel, name, 1) != 1:
            raise FxportError(f"a port is served with {name}=1, not {getattr(parallel, name)}")
