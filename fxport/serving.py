"""The serving graphs of a port: what vLLM runs, as three graphs over flat tokens.

    embed(input_ids [1, N])                        -> embeddings [1, N, C]
    body(embeddings, positions [N], [input_ids])   -> hidden     [1, N, C]
                                                      (input_ids only where it is used again)
    head(hidden [1, M, C])                         -> logits     [1, M, V]

N tokens of many requests lie end to end; only ``fxport::attention`` looks at other tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import fx

from fxport.capture.arguments import arguments
from fxport.ops.params import AttentionParams

aten = torch.ops.aten
# What only passes token ids on.
_PASSING_ON = {
    aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten.contiguous.default,
    aten.clone.default, aten.alias.default, aten.detach.default, aten.to.dtype, aten.select.int,
    aten.slice.Tensor, aten.unsqueeze.default,
}  # fmt: skip

__all__ = ["AttentionLayer", "Part", "ServingGraph"]


@dataclass(frozen=True)
class Part:
    """One graph. Placeholders: `inputs` in order, then weights by qualified name.

    Attributes:
        graph: call_function nodes only; ``meta["val"]`` is not needed any more.
        inputs: names of the placeholders that the caller passes.
        weights: placeholder name -> qualified name of a parameter or constant.
    """

    graph: fx.Graph
    inputs: tuple[str, ...]
    weights: Mapping[str, str]


@dataclass(frozen=True)
class AttentionLayer:
    """Geometry of one attention call, in the order of the body's attention nodes.

    Attributes:
        num_heads, num_kv_heads, head_size, head_size_v: of the whole model, before sharding.
        params: scale, window, softcap.
        sinks: what is added to every row's denominator is the exponential of: the qualified name of
            a parameter ``[num_heads]``; or one number a head, a constant of the model.
        alibi_slopes: one number a head, a constant of the model.
    """

    num_heads: int
    num_kv_heads: int
    head_size: int
    head_size_v: int
    params: AttentionParams
    sinks: str | tuple[float, ...] | None = None
    alibi_slopes: tuple[float, ...] | None = None


@dataclass(frozen=True)
class ServingGraph:
    """Everything that vLLM needs of a port, without weights.

    Attributes:
        embed, body, head: see the module's docstring.
        attention: geometry of the attention calls.
        constants: qualified name -> tensor that is not learned (rotary tables, ...).
        parameters: qualified name -> shape of the learned tensors that the graphs use.
        aliases: further names of tied parameters -> the name used here.
        unused: tensors of the original's state_dict that serving does not need (masks).
        vocab_size, hidden_size, max_position_embeddings: sizes.
        dtype: in which attention runs, and most parameters are.
        dtypes: parameters of another dtype.
        untrainable: why the original has other gradients than these graphs, in words.
    """

    embed: Part
    body: Part
    head: Part
    attention: tuple[AttentionLayer, ...]
    constants: Mapping[str, torch.Tensor]
    parameters: Mapping[str, tuple[int, ...]]
    aliases: Mapping[str, str]
    unused: tuple[str, ...]
    vocab_size: int
    hidden_size: int
    max_position_embeddings: int
    dtype: torch.dtype
    untrainable: tuple[str, ...] = ()
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)

    def dtype_of(self, name: str) -> torch.dtype:
        """In which dtype a parameter is held."""
        return self.dtypes.get(name, self.dtype)

    @property
    def known_ids(self) -> int:
        """How many token ids can be looked up: the logits may be padded to more."""
        rows = [
            shape[0]
            for part in (self.embed, self.body)
            for shape in map(self._shape, _tables(part))
            if shape
        ]
        return min([self.vocab_size, *rows])

    def _shape(self, name: str) -> tuple[int, ...]:
        constant = self.constants.get(name)
        return self.parameters.get(name, ()) if constant is None else tuple(constant.shape)


def _tables(part: Part) -> list[str]:
    """Names of the tables in which the ids themselves are looked up."""
    same = {n for n in part.graph.find_nodes(op="placeholder") if n.name == "input_ids"}
    found = []
    for node in part.graph.nodes:
        if node.target in _PASSING_ON and node.args[0] in same:
            same.add(node)
        elif node.target is aten.embedding.default:
            given = arguments(node)
            if given["indices"] in same and given["weight"].name in part.weights:
                found.append(part.weights[given["weight"].name])
    return found
