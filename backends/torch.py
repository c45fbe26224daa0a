"""Runs a serving graph in plain PyTorch, and checks it against the original with numbers.

Several sequences lie end to end, as in vLLM; attention sees them through ``cu_seqlens``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NoReturn, TypeVar

import torch
from torch import fx, nn

import fxport.ops.attention  # noqa: F401  (registers the op)
from fxport.capture.location import forward_line
from fxport.capture.one import line_about_one
from fxport.capture.sample import device_of
from fxport.capture.trace import in_one_line
from fxport.errors import FxportError, PortError, Reason, ReasonCode
from fxport.nested import attach
from fxport.serving import Part, ServingGraph

__all__ = [
    "ROUNDING",
    "Difference",
    "PackedModel",
    "PortedModel",
    "check_against",
    "relative_error",
]

_Result = TypeVar("_Result")
_ATTENTION = torch.ops.fxport.attention.default


class _Graphs:
    """The three parts as one function of weights, flat tokens, positions and segment ends."""

    def __init__(self, serving: ServingGraph) -> None:
        self._embed = _callable(serving.embed)
        self._body = _callable(_with_segments(serving.body))
        self._head = _callable(serving.head)

    def __call__(
        self,
        weights: Mapping[str, torch.Tensor],
        ids: torch.Tensor,
        lengths: Sequence[int],
        disturb: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """ids ``[1, N]``, sequences of these lengths end to end -> logits ``[1, N, V]``.

        `disturb` is given the embeddings ``[N, C]``; its result is used instead.
        """
        positions = torch.cat([torch.arange(n, device=ids.device) for n in lengths])
        ends = torch.tensor([0, *lengths], device=ids.device).cumsum(0).to(torch.int32)
        # As vLLM has them: one row for each token.
        embeddings = self._embed(weights, input_ids=ids)[0]
        if disturb is not None:
            embeddings = disturb(embeddings)
        hidden = self._body(
            weights,
            embeddings=embeddings[None],
            positions=positions,
            input_ids=ids,
            cu_seqlens=ends,
        )[0]
        return self._head(weights, hidden=hidden[None])


def _callable(part: Part) -> Callable[..., torch.Tensor]:
    module = fx.GraphModule(nn.Module(), part.graph)
    names = [n.name for n in part.graph.nodes if n.op == "placeholder"]

    def call(weights: Mapping[str, torch.Tensor], **inputs: torch.Tensor) -> torch.Tensor:
        given = {**inputs, **{node: weights[name] for node, name in part.weights.items()}}
        return module(*(given[name] for name in names))

    return call


class PackedModel:
    """A serving graph with weights: flat tokens in, logits of every token out."""

    def __init__(self, serving: ServingGraph, parameters: Mapping[str, torch.Tensor]) -> None:
        self._weights = {**parameters, **serving.constants}
        self._graphs = _Graphs(serving)

    @torch.no_grad()
    def __call__(
        self,
        sequences: Sequence[torch.Tensor],
        disturb: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> list[torch.Tensor]:
        """Logits ``[T_i, V]`` for each sequence of token ids ``[T_i]`` int64."""
        lengths = [len(s) for s in sequences]
        logits = self._graphs(self._weights, torch.cat(list(sequences))[None], lengths, disturb)
        return list(logits[0].split(lengths))


class PortedModel(nn.Module):
    """A serving graph as a module: the original's parameter names, differentiable."""

    def __init__(self, serving: ServingGraph, parameters: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        for name, tensor in parameters.items():
            attach(self, name, nn.Parameter(tensor, tensor.is_floating_point()))
        for name, tensor in serving.constants.items():
            attach(self, name, tensor)
        self._graphs = _Graphs(serving)
        self._untrainable = serving.untrainable
        self.max_position_embeddings = serving.max_position_embeddings

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """``[B, T]`` int64 -> logits ``[B, T, V]``.

        Raises:
            ValueError: T is beyond what the port was made for.
            FxportError: in backward, where the original has gradients that no graph holds.
        """
        batch, length = tokens.shape
        if length > self.max_position_embeddings:
            limit = self.max_position_embeddings
            raise ValueError(f"{length} tokens; this port takes at most {limit}")
        weights = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        logits = self._graphs(weights, tokens.reshape(1, -1), [length] * batch)
        result = logits[0].unflatten(0, (batch, length))
        if self._untrainable and result.requires_grad:
            result.register_hook(self._refuse)
        return result

    def _refuse(self, gradient: torch.Tensor) -> NoReturn:
        raise FxportError("a loaded port cannot train this model: " + "; ".join(self._untrainable))


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
ROUNDING = 2000.0
# In half precision that would be more than the logits themselves.
_ROUNDING_OF_HALVES = 32.0
# Beyond those: as a multiple of what one rounding of the embeddings does to the logits. Two right
# computations of eight models in three dtypes differed by at most 1.9 times that.
_OF_ONE_ROUNDING, _AT_MOST = 16.0, 0.01
# For one token in half precision.
_ROUNDING_OF_ONE, _AS_OTHERS = 0.01, 16.0


class Difference(PortError):
    """The serving graph gives other numbers than the original."""


def check_against(
    model: nn.Module,
    logits_of: Callable[[torch.Tensor], torch.Tensor],
    packed: PackedModel,
    lengths: Sequence[int],
    known_ids: int,
    dtype: torch.dtype,
) -> float:
    """Compares original and serving graph on random tokens, all lengths in one packed batch.

    How much rounding makes of itself is the model's own (a deep recurrence multiplies it): what
    differs by more than usual is measured against what one rounding of the embeddings does.
    Nothing else is known of one token: it may not differ by much more than longer sequences do.

    Args:
        model: where the tokens must live is read off its parameters.
        logits_of: the original: ids ``[1, T]`` -> logits ``[T, V]`` or ``[V]`` (last only).
        lengths: one sequence of each length is made.
        known_ids: of token ids below this.

    Returns:
        The largest difference, relative to the largest logit.

    Raises:
        Difference: beyond rounding; names the length and position of the largest difference.
    """
    device = device_of(model)
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.randint(0, known_ids, (n,), generator=generator).to(device) for n in lengths]
    results = _run("the serving graph", lambda: packed(sequences))
    errors: dict[int, float] = {}
    for sequence, found in zip(sequences, results, strict=True):
        what = f"the model itself, at length {len(sequence)},"
        expected = _run(what, partial(logits_of, sequence[None]))
        last_only = expected.dim() == 1
        errors[len(sequence)] = relative_error(found[-1] if last_only else found, expected)
    bound = _usual_rounding(dtype)
    if not all(error <= bound for error in errors.values()):
        bound = max(bound, _measured_rounding(packed, sequences, results, dtype))
    worst = 0.0
    for length, error in sorted(errors.items(), reverse=True):
        if length == 1 and len(errors) > 1:
            bound = min(bound, max(_ROUNDING_OF_ONE, _AS_OTHERS * worst))
        if not error <= bound:
            raise _difference(model, length, error, bound)
        worst = max(worst, error)
    return worst


def _difference(model: nn.Module, length: int, error: float, bound: float) -> Difference:
    where = line_about_one(model) or forward_line(model) if length == 1 else None
    message = (
        f"the serving graph differs from the model at length {length}: "
        f"relative difference {error:.1e}, rounding would be below {bound:.1e}"
    )
    hint = "the model takes another path at this length, or this is a bug of fxport"
    return Difference([Reason(ReasonCode.SELF_CHECK, message, where, hint=hint)])


def _usual_rounding(dtype: torch.dtype) -> float:
    units = _ROUNDING_OF_HALVES if dtype.itemsize < 4 else ROUNDING
    return units * torch.finfo(dtype).eps


def _measured_rounding(
    packed: PackedModel,
    sequences: Sequence[torch.Tensor],
    results: Sequence[torch.Tensor],
    dtype: torch.dtype,
) -> float:
    most = ROUNDING * torch.finfo(dtype).eps if dtype.itemsize < 4 else _AT_MOST
    return min(_OF_ONE_ROUNDING * _one_rounding(packed, sequences, results), most)


def _one_rounding(
    packed: PackedModel, sequences: Sequence[torch.Tensor], results: Sequence[torch.Tensor]
) -> float:
    """The largest change of logits, relative to the largest, when every entry of the embeddings
    is moved by one unit in its last place, up or down at random; 0 where it cannot be told."""
    generator = torch.Generator().manual_seed(1)

    def disturb(embeddings: torch.Tensor) -> torch.Tensor:
        up = torch.randint(0, 2, embeddings.shape, generator=generator).to(embeddings)
        return embeddings * (1 + torch.finfo(embeddings.dtype).eps * (2 * up - 1))

    changed = packed(sequences, disturb)
    errors = [relative_error(a, b) for a, b in zip(changed, results, strict=True)]
    return max(errors) if all(math.isfinite(error) for error in errors) else 0.0


def _run(what: str, run: Callable[[], _Result]) -> _Result:
    try:
        return run()
    except (RuntimeError, IndexError, ValueError, AssertionError) as error:
        message = f"{what} fails on random token ids: {in_one_line(error)}"
        hint = "say how long sequences may be, max_seq_len=..., if they are too long"
        raise Difference([Reason(ReasonCode.SELF_CHECK, message, hint=hint)]) from error


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, relative to the largest expected value; inf for another shape.

    Infinities and NaN must be in the same places.
    """
    if found.shape != expected.shape:
        return float("inf")
    finite = expected.isfinite()
    if not torch.equal(finite, found.isfinite()):
        return float("inf")
    if not bool(finite.any()):
        return 0.0
    difference = (found[finite].double() - expected[finite].double()).abs().max()
    return float(difference / expected[finite].double().abs().max().clamp_min(1e-30))
