"""Linear layers that read the same value become one product, as in vLLM's own model classes.

Before                              After
    q = linear(x, w_q)                  y = call_module siblings.s0(x)
    k = linear(x, w_k)                  q, k, v = y[0], y[1], y[2]
    v = linear(x, w_v)

One large product instead of several small ones: what a single token costs is the reading of the
weights, which small products do not do at full speed.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import fx, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.linear import ReplicatedLinear

from fxport.backends.vllm.linears import as_rows
from fxport.capture.arguments import arguments

__all__ = ["Joined", "Sibling", "replace_siblings", "sibling_groups"]


@dataclass(frozen=True)
class Sibling:
    """One of several linear layers over the same value; names of the port's parameters."""

    node: fx.Node
    weight: str
    bias: str | None


def sibling_groups(
    graph: fx.Graph,
    own: Callable[[fx.Node | None], str | None],
    attention: torch._ops.OpOverload,
) -> list[list[Sibling]]:
    """Groups of at least two, in the graph's order.

    Never across an attention: vLLM cuts the graph there, and a value that waits for a later layer
    would be held until then.

    Args:
        own: the name of a parameter that only this node's user reads; None for anything else.
    """
    groups: dict[tuple[fx.Node, int, bool], list[Sibling]] = {}
    layer = 0
    for node in graph.nodes:
        if node.target is attention:
            layer += 1
        elif node.target is torch.ops.aten.linear.default:
            bound = arguments(node)
            weight, bias = own(bound["weight"]), own(bound["bias"])
            if weight is not None and (bound["bias"] is None or bias is not None):
                key = (bound["input"], layer, bias is None)
                groups.setdefault(key, []).append(Sibling(node, weight, bias))
    return [group for group in groups.values() if len(group) > 1]


def replace_siblings(graph: fx.Graph, group: Sequence[Sibling], path: str) -> None:
    """Calls the `Joined` at `path` in the place of the group."""
    first = group[0].node
    with graph.inserting_before(first):
        outputs = graph.call_module(path, (arguments(first)["input"],))
        for index, sibling in enumerate(group):
            output = graph.call_function(operator.getitem, (outputs, index))
            sibling.node.replace_all_uses_with(output)
    for sibling in group:
        graph.erase_node(sibling.node)


class Joined(nn.Module):
    """vLLM's layer over the weights of several, one below the other.

    Args:
        shapes: of the weights, ``[out_i, in]``.
        dtype: of the value that they read, and of them.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, ...]],
        dtype: torch.dtype,
        bias: bool,
        vllm_config: VllmConfig,
        prefix: str,
    ) -> None:
        super().__init__()
        self.sizes = [shape[0] for shape in shapes]
        self.linear = ReplicatedLinear(
            shapes[0][1],
            sum(self.sizes),
            bias=bias,
            params_dtype=dtype,
            quant_config=vllm_config.quant_config,
            prefix=prefix,
            return_bias=False,
        )

    def filled_by(self, group: Sequence[Sibling]) -> Iterator[tuple[str, torch.Tensor, slice]]:
        """Which parameter of the port fills which rows of weight and bias."""
        ends = itertools.accumulate(self.sizes)
        for sibling, size, end in zip(group, self.sizes, ends, strict=True):
            yield sibling.weight, self.linear.get_parameter("weight"), slice(end - size, end)
            if sibling.bias is not None:
                yield sibling.bias, self.linear.get_parameter("bias"), slice(end - size, end)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """``[..., in]`` -> ``[..., out_i]`` for every layer."""
        y = self.linear(as_rows(x))
        return y.reshape(*x.shape[:-1], y.shape[-1]).split(self.sizes, dim=-1)
