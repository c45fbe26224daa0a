"""`fxport.port`: capture a model, prove it, and give back something to train and to serve."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from fxport.diff.stages import Stage
from fxport.errors import FxportError, PortError, Reason, ReasonCode
from fxport.report import Decision, Outcome, Report
from fxport.saved import GenerationConfig, Tokenizer, write_port
from fxport.serving import Part, ServingGraph

if TYPE_CHECKING:
    from fxport.capture.export import Captured
    from fxport.capture.extra_arguments import ExampleInputs
    from fxport.capture.walk import Walked

__all__ = ["Port", "port", "trainable"]


@dataclass(frozen=True)
class Port:
    """A proven port of one model.

    Attributes:
        serving: the graphs that vLLM runs in the parameters' own dtype.
        half: the same for bfloat16 and float16, when the model is in float32.
        parameters: the model's own parameters (shared, not copied) by qualified name.
        report: what was decided, and why.
        stages: the graph after every pass, and what the pass changed.
    """

    serving: ServingGraph
    half: ServingGraph | None
    parameters: Mapping[str, torch.Tensor]
    report: Report
    _model: nn.Module = field(repr=False)
    stages: tuple[Stage, ...] = field(default=(), repr=False)

    @cached_property
    def module(self) -> nn.Module:
        """The model with flash attention: same call, same parameter names, trainable.

        A copy of the modules that shares the parameters with the original.
        """
        return trainable(self._model)

    def save(self, directory: str | Path, tokenizer: Tokenizer | str | Path | None = None) -> Path:
        """Writes a directory that ``vllm.LLM(directory)`` serves.

        A Hugging Face model's generation config goes with it.

        Args:
            directory: must not exist, or be empty. It appears complete or not at all.
            tokenizer: an object with ``save_pretrained``, or a directory to copy files from.

        Raises:
            FxportError: the directory exists, or parameters are on the meta device.
        """
        from fxport.passes.tokens.rules import may_be_saved

        return write_port(
            directory,
            self.serving,
            self.half,
            self.parameters,
            self.report,
            may_be_saved,
            tokenizer,
            self._generation_config(),
        )

    def _generation_config(self) -> GenerationConfig | None:
        """A Hugging Face model's defaults for sampling, which vLLM reads."""
        found = getattr(self._model, "generation_config", None)
        return found if callable(getattr(found, "to_json_file", None)) else None


def trainable(model: nn.Module) -> nn.Module:
    """A copy of the modules, sharing the parameters, that runs under ``vllm_generic``."""
    from fxport.backends.dynamo import vllm_generic
    from fxport.capture.clone import clone_for_capture, take_modes

    clone = clone_for_capture(model, lend=True)
    take_modes(clone, model)
    clone.compile(backend=vllm_generic)
    return clone


def port(
    model: nn.Module,
    example_inputs: ExampleInputs | None = None,
    *,
    max_seq_len: int | None = None,
) -> Port:
    """Ports a plain causal language model: ``model(tokens[B, T]) -> logits[B, T, V]``.

    A model that takes ``[T, B]``, ``[T]`` or ``[1, T]`` alone, that loops over the rows of the
    batch, or that returns the loss is found out and proven as such. The model is not changed. Eval
    mode is used for serving whatever mode the model is in.

    Args:
        model: any `nn.Module`; its forward may return the logits in a tuple, dict or dataclass.
        example_inputs: for a forward that needs more than the token ids: the arguments of one
            call (a tuple, or a mapping by name), the ids among them, several of them long. The
            report says how each other argument was fixed for every call.
        max_seq_len: the longest sequence to serve; by default the longest that the model allows.
            What the model does with longer ones, and keeps of them, does not matter then.

    Raises:
        PortError: the model cannot be proven; every obstacle with file and line.
        FxportError: `max_seq_len` is beyond what the model allows, or `example_inputs` does not
            say what an argument is.
    """
    from fxport.capture.clone import uncompiled
    from fxport.capture.extra_arguments import token_ids_alone, unknown_arguments

    model = uncompiled(model)
    called, fixed = token_ids_alone(model, example_inputs)
    try:
        found, adapted = _as_called(called, max_seq_len)
    except PortError as error:
        refused = error if example_inputs is not None else unknown_arguments(model, error)
        raise _with_lines(refused, model) from None
    return _of_model(found, model, (*fixed, *adapted))


def _with_lines(refused: PortError, model: nn.Module) -> PortError:
    """What no line is known for is in forward's, or in what it calls."""
    from fxport.capture.location import forward_line

    line = forward_line(model)
    return PortError(
        [r if r.location else dataclasses.replace(r, location=line) for r in refused.reasons]
    )


def _as_called(model: nn.Module, max_seq_len: int | None) -> tuple[Port, tuple[Decision, ...]]:
    """The port of a model that takes token ids alone, and what was put around it for that."""
    from fxport.capture.conventions import adaptations

    try:
        return _batch_first(model, max_seq_len), ()
    except PortError:
        adapted, decisions = adaptations(model)
        if not decisions:
            raise
    return _batch_first(adapted, max_seq_len), decisions


def _of_model(found: Port, model: nn.Module, decisions: tuple[Decision, ...]) -> Port:
    """The port of the adapted copy as a port of the model itself."""
    if not decisions:
        return found
    report = dataclasses.replace(found.report, decisions=(*decisions, *found.report.decisions))
    return dataclasses.replace(found, _model=model, report=report)


def _batch_first(model: nn.Module, max_seq_len: int | None) -> Port:
    """See `port`; for a model that takes ``[B, T]``."""
    from fxport.capture.every_row import every_row_records
    from fxport.capture.export import capture
    from fxport.passes.every_step import every_step_records
    from fxport.passes.serving import lower_for_serving

    captured = capture(model, most=max_seq_len)
    lowered = lower_for_serving(captured, max_seq_len, _stated_length(model))
    selections = every_row_records(captured.graph)  # those that no pass took out
    serving = lowered.serving
    if not serving.attention:
        message = "the model has no attention, and vLLM serves what keeps keys and values"
        raise PortError([Reason(ReasonCode.UNSUPPORTED_FEATURE, message)])
    checked = _self_check(model, serving, captured)
    half, half_decision = _half(model, serving, captured)
    respelled = (*_experts(captured.experts), *_unkept(captured.unkept), *_walked(captured.walked))
    slow = (*selections, *every_step_records(serving))
    decisions = (*respelled, *slow, *lowered.decisions, half_decision, checked)
    facts: dict[str, str | int | float | bool | None] = {
        "vocab_size": serving.vocab_size,
        "hidden_size": serving.hidden_size,
        "num_attention_layers": len(serving.attention),
        "max_position_embeddings": serving.max_position_embeddings,
        "dtype": str(serving.dtype).removeprefix("torch."),
        "parameters": sum(p.numel() for p in captured.parameters.values()),
        "logits": captured.output,
    }
    report = Report(type(model).__name__, facts, decisions)
    return Port(serving, half, captured.parameters, report, model, lowered.stages)


def _experts(replaced: str) -> tuple[Decision, ...]:
    """That a library's other implementation of experts was captured, and in place of what."""
    if not replaced:
        return ()
    detail = (
        f"captured as transformers' batched_mm instead of {replaced}; "
        "their equality rests on transformers and on the self-check"
    )
    return (Decision("capture", Outcome.REWRITTEN, "experts", detail),)


def _unkept(caches: tuple[str, ...]) -> tuple[Decision, ...]:
    """That what forward writes into caches of its own is not written by the port."""
    if not caches:
        return ()
    detail = f"not written: {', '.join(f'`{name}`' for name in caches)}; the logits read none of it"
    return (Decision("capture", Outcome.PROVEN, "the model's own caches", detail),)


def _walked(lengths: Walked | None) -> tuple[Decision, ...]:
    """What was seen of the lengths where forward takes the length as a plain number."""
    if lengths is None:
        return ()
    subject, seen = "the length as a plain number", lengths.in_words()
    if lengths.every:
        return (Decision("capture", Outcome.PROVEN, subject, seen),)
    reason = Reason(
        ReasonCode.DEPENDS_ON_LENGTH,
        "forward may take another path at a length that was not looked at",
        hint="leave out int() around the length, or port for a smaller max_seq_len",
    )
    return (Decision("capture", Outcome.LEFT, subject, seen, reason=reason),)


def _stated_length(model: nn.Module) -> int | None:
    """What a Hugging Face configuration says where the code bounds nothing (rotary positions)."""
    config = getattr(model, "config", None)
    of_text = getattr(config, "get_text_config", None)
    if callable(of_text):  # a model that also takes images keeps it apart
        config = of_text(decoder=True)
    found = getattr(config, "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def _half(
    model: nn.Module, serving: ServingGraph, own: Captured
) -> tuple[ServingGraph | None, Decision]:
    """The graph for half precision: vLLM serves float32 checkpoints so unless told otherwise.

    Traced as if the model had been converted, so that its own casts mean what they say.
    Tables stay in float32 where the model's code allows it.
    """
    from fxport.capture.export import capture
    from fxport.passes.dtypes import refuse_missing_kernels
    from fxport.passes.serving import lower_for_serving

    if serving.dtype != torch.float32:
        detail = f"the model's own: {str(serving.dtype).removeprefix('torch.')}"
        return None, Decision("precision", Outcome.PROVEN, "serving dtype", detail)
    length = serving.max_position_embeddings
    refused: PortError | None = None
    for buffers in (False, True):
        try:
            captured = capture(
                model,
                torch.bfloat16,
                convert_buffers=buffers,
                own=own,
                needed=length,
                most=length,
            )
            half = lower_for_serving(captured, length).serving
            refuse_missing_kernels(half)
        except PortError as error:
            refused = refused or error
            continue
        except FxportError as error:  # it does not take sequences as long in half precision
            refused = refused or PortError([Reason(ReasonCode.LENGTH_SPECIALISED, str(error))])
            continue
        kept = "converted, as model.bfloat16() does" if buffers else "float32"
        detail = f"float32, bfloat16 or float16; constants in half precision: {kept}"
        return _renamed(half, serving), Decision(
            "precision", Outcome.PROVEN, "serving dtype", detail
        )
    assert refused is not None
    reason = dataclasses.replace(
        refused.reasons[0], message=f"float32 only: {refused.reasons[0].message}"
    )
    return None, Decision("precision", Outcome.LEFT, "serving dtype", "float32", reason=reason)


def _renamed(half: ServingGraph, own: ServingGraph) -> ServingGraph:
    """Constants that differ from the float32 graph's get names of their own."""
    names = {
        name: name
        if name in own.constants and _identical(value, own.constants[name])
        else f"fxport_half.{name}"
        for name, value in half.constants.items()
    }

    def renamed(part: Part) -> Part:
        weights = {node: names.get(name, name) for node, name in part.weights.items()}
        return dataclasses.replace(part, weights=weights)

    return dataclasses.replace(
        half,
        embed=renamed(half.embed),
        body=renamed(half.body),
        head=renamed(half.head),
        constants={names[name]: value for name, value in half.constants.items()},
    )


def _identical(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)


# --- the numeric self-check -------------------------------------------------------------------

_CHECK_LENGTHS = (1, 2, 3, 7, 37)
# Rough cost of the check in multiply-adds, and in attention weights that the original holds at
# once; beyond either, the longest lengths are left out.
_CHECK_BUDGET = 4e11
_CHECK_WEIGHTS = 3e7


def _self_check(model: nn.Module, serving: ServingGraph, captured: Captured) -> Decision:
    """Original and serving graph on random tokens; the longest length too where it is cheap.

    Where forward may take another path at some length, on both sides of it.
    """
    from fxport.backends.torch import PackedModel, check_against
    from fxport.capture.clone import clone_to_run, spread_constants
    from fxport.original import logits_function
    from fxport.passes.dtypes import coarsest

    parameters = captured.parameters
    if any(p.is_meta for p in parameters.values()):
        return _unchecked("the parameters are on the meta device, so there is nothing to compare")
    size = sum(p.numel() for p in parameters.values())
    longest = serving.max_position_embeddings
    doubtful = (n + side for n in captured.doubtful for side in (-1, 0, 1))
    lengths = sorted({n for n in (*_CHECK_LENGTHS, *doubtful, longest) if 1 <= n <= longest})
    heads = max(layer.num_heads for layer in serving.attention)
    left_out = []
    while len(lengths) > 1 and (
        sum(lengths) * size > _CHECK_BUDGET or heads * lengths[-1] ** 2 > _CHECK_WEIGHTS
    ):
        left_out.append(lengths.pop())
    clone = clone_to_run(model)
    spread_constants(clone)
    worst = check_against(
        model,
        logits_function(clone, serving.vocab_size),
        PackedModel(serving, {**parameters, **dict(clone.named_parameters())}),
        lengths,
        serving.known_ids,
        coarsest(serving),
    )
    listed = ", ".join(str(n) for n in lengths)
    return Decision(
        "self-check",
        Outcome.PROVEN,
        "logits on random tokens",
        f"equal to the original's at lengths {listed}: relative difference {worst:.1e}"
        + _not_compared(captured.doubtful, left_out),
    )


def _not_compared(doubtful: Sequence[int], left_out: Sequence[int]) -> str:
    """What the report says of lengths at which only numbers tell, and nobody looked."""
    missed = sorted(set(doubtful) & set(left_out))
    if not missed:
        return ""
    listed = ", ".join(map(str, missed))
    return f"; forward takes the length as a plain number, and {listed} were too long to compare"


def _unchecked(why: str) -> Decision:
    reason = Reason(ReasonCode.SELF_CHECK, f"not compared with numbers: {why}")
    return Decision("self-check", Outcome.LEFT, "logits on random tokens", "", reason=reason)
