"""Runs a serving graph in plain PyTorch, and checks it against the original with numbers.

Several sequences lie end to end, as in vLLM; attention sees them through ``cu_seqlens``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import fx, nn

import fxport.ops.attention  # noqa: F401  (registers the op)
from fxport.errors import PortError, Reason, ReasonCode
from fxport.serving import Part, ServingGraph

__all__ = ["Difference", "PackedModel", "check_against"]

_ATTENTION = torch.ops.fxport.attention.default


class PackedModel:
    """A serving graph with weights: flat tokens in, logits of every token out."""

    def __init__(self, serving: ServingGraph, parameters: Mapping[str, torch.Tensor]) -> None:
        self._weights = {**parameters, **serving.constants}
        self._embed = self._callable(serving.embed)
        self._head = self._callable(serving.head)
        self._body = self._callable(_with_segments(serving.body))

    def _callable(self, part: Part) -> Callable[..., torch.Tensor]:
        module = fx.GraphModule(nn.Module(), part.graph)
        weights = {node: self._weights[name] for node, name in part.weights.items()}
        names = [n.name for n in part.graph.nodes if n.op == "placeholder"]

        def call(**inputs: torch.Tensor) -> torch.Tensor:
            given = {**inputs, **weights}
            return module(*(given[name] for name in names))

        return call

    @torch.no_grad()
    def __call__(self, sequences: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Logits ``[T_i, V]`` for each sequence of token ids ``[T_i]`` int64."""
        lengths = [len(s) for s in sequences]
        device = sequences[0].device
        input_ids = torch.cat(list(sequences))[None]
        positions = torch.cat([torch.arange(n, device=device) for n in lengths])
        ends = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
        hidden = self._body(
            embeddings=self._embed(input_ids=input_ids),
            positions=positions,
            input_ids=input_ids,
            cu_seqlens=ends,
        )
        return list(self._head(hidden=hidden)[0].split(lengths))


def _with_segments(part: Part) -> Part:
    """The same graph with an input `cu_seqlens` that every attention call gets."""
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    last_input = [n for n in part.graph.nodes if n.op == "placeholder"][-1]
    names = [a.name for a in _ATTENTION._schema.arguments]
    segments: fx.Node | None = None
    for node in part.graph.nodes:
        copied[node] = graph.node_copy(node, lambda n: copied[n])
        if node is last_input:
            segments = graph.placeholder("cu_seqlens")
        if node.target is _ATTENTION:
            copied[node].update_arg(names.index("cu_seqlens"), segments)
    return Part(graph, (*part.inputs, "cu_seqlens"), part.weights)


# Rounding of a whole model relative to its largest logit, in units of the dtype's epsilon.
_ROUNDING = 2000.0


class Difference(PortError):
    """The serving graph gives other numbers than the original."""


def check_against(
    model: nn.Module,
    logits_of: Callable[[torch.Tensor], torch.Tensor],
    packed: PackedModel,
    lengths: Sequence[int],
    vocab_size: int,
    dtype: torch.dtype,
) -> float:
    """Compares original and serving graph on random tokens, all lengths in one packed batch.

    Args:
        model: where the tokens must live is read off its parameters.
        logits_of: the original: ids ``[1, T]`` -> logits ``[T, V]`` or ``[V]`` (last only).
        lengths: one sequence of each length is made.

    Returns:
        The largest difference, relative to the largest logit.

    Raises:
        Difference: beyond rounding; names the length and position of the largest difference.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    sequences = [
        torch.randint(0, vocab_size, (n,), generator=generator).to(device) for n in lengths
    ]
    bound = _ROUNDING * torch.finfo(dtype).eps
    worst = 0.0
    for sequence, found in zip(sequences, packed(sequences), strict=True):
        expected = logits_of(sequence[None])
        found = found[-1] if expected.dim() == 1 else found
        error = _relative_error(found, expected)
        if not error <= bound:
            reason = Reason(
                ReasonCode.SELF_CHECK,
                f"the serving graph differs from the model at length {len(sequence)}: "
                f"relative difference {error:.1e}, rounding would be below {bound:.1e}",
                hint="the model takes another path at this length, or this is a bug of fxport",
            )
            raise Difference([reason])
        worst = max(worst, error)
    return worst


def _relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    if found.shape != expected.shape:
        return float("inf")
    finite = expected.isfinite()
    if not torch.equal(finite, found.isfinite()):
        return float("inf")
    difference = (found[finite].double() - expected[finite].double()).abs()
    scale = expected[finite].double().abs().max().clamp_min(1e-30)
    return float(difference.max() / scale) if difference.numel() else 0.0
