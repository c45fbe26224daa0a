"""The serving door: one pre-dispatch ATen graph of a plain model, valid for every length.

model(tokens[B, T])  ->  Captured(graph: parameters, buffers, tokens -> logits [B, T, V])
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import sympy
import torch
from torch import fx, nn

from fxport.capture.arguments import shape_of_tensor
from fxport.capture.calls_before import refuse_counted_calls
from fxport.capture.clone import clone_for_capture, convert, off_meta, take_modes
from fxport.capture.gradients import watch_gradients
from fxport.capture.hugging_face import experts_by_row, without_cache
from fxport.capture.lengths import trace_at_lengths, trace_one_more
from fxport.capture.location import forward_line
from fxport.capture.longest import continues
from fxport.capture.outputs import plain_outputs
from fxport.capture.symbolic import trace_symbolically
from fxport.capture.trace import aliases_of
from fxport.capture.traced import Traced
from fxport.capture.walk import Walked
from fxport.errors import Location, PortError, Reason, ReasonCode

__all__ = ["Captured", "capture", "ready"]


@dataclass(frozen=True)
class Captured:
    """The captured model.

    Attributes:
        graph: placeholders carry `GraphInput`; exactly one of them is DATA, the token ids
            ``[B, T]`` int64; the only output is the logits.
        tokens: name of that placeholder.
        batch, length: the symbols of B and T in ``meta["val"]`` shapes.
        shortest: the smallest T (at least 2) for which the graph is valid; a model that takes one
            path for every length has 2 here, and length 1 is checked with numbers.
        limit: the largest T for which the graph is valid, None when nothing bounds it.
        parameters: qualified name -> the own parameter of the model (tied: under the first name).
        length_line: the user's line that asked about the length, else where forward begins.
        state: every name of the original's state_dict.
        aliases: further names of tied parameters -> first name.
        output: which output of the model the logits are, in words.
        way: how it was captured, in words.
        unkept: inputs that forward writes to and the logits do not depend on: caches.
        doubtful, walked, unseen: see `Traced`.
        experts: the implementation of experts that was captured as a loop instead, or "".
        untrainable: why the graph has another gradient than the model.
        symbolic: see `Traced`.
    """

    graph: fx.GraphModule
    tokens: str
    batch: sympy.Symbol
    length: sympy.Symbol
    shortest: int
    limit: int | None
    parameters: Mapping[str, torch.Tensor]
    length_line: Location | None
    state: tuple[str, ...]
    aliases: Mapping[str, str]
    output: str
    way: str
    unkept: tuple[str, ...] = ()
    doubtful: tuple[int, ...] = ()
    walked: Walked | None = None
    unseen: str = ""
    experts: str = ""
    untrainable: tuple[Reason, ...] = ()
    symbolic: bool = False


def capture(
    model: nn.Module,
    dtype: torch.dtype | None = None,
    *,
    convert_buffers: bool = False,
    own_modes: bool = False,
    own: Captured | None = None,
    needed: int = 0,
    most: int | None = None,
) -> Captured:
    """Captures `model(tokens)` in eval mode, without gradient, for dynamic batch and length.

    The model itself is not run and not changed: a copy that shares its tensors is.

    Args:
        dtype: capture as if the parameters had this dtype; they have no values then.
        convert_buffers: with `dtype`, convert floating point buffers too.
        own_modes: leave every module in the mode it is in, training or eval.
        own: with `dtype`, the model as captured in its own dtype: if plain lengths were the way
            then, a symbolic length is not tried again.
        needed: see `trace_symbolically`.
        most: see `trace_at_lengths`.

    Raises:
        PortError: when the model cannot be captured as one graph that holds for every length.
    """
    clone = clone_for_capture(model)
    if own_modes:
        take_modes(clone, model)
    parameters = dict(clone.named_parameters(remove_duplicate=True))
    experts = ready(clone)
    calls_known = True
    if dtype is not None:
        convert(clone, dtype, buffers=convert_buffers)
        parameters = dict(clone.named_parameters(remove_duplicate=True))
    else:
        calls_known = refuse_counted_calls(clone)
    frozen = _frozen(model, dtype)
    with watch_gradients(model) as untrainable:
        plain = own is not None and not own.symbolic
        every = dtype is None
        traced = _trace(
            clone, every_pair=every, plain=plain, needed=needed, most=most, frozen=frozen
        )
    if not calls_known:
        raise PortError([_unknown_calls(model)])
    return Captured(
        graph=traced.graph,
        tokens=traced.tokens.name,
        batch=traced.batch,
        length=traced.length,
        shortest=traced.shortest,
        limit=traced.limit,
        parameters=parameters,
        length_line=traced.length_line or forward_line(model),
        state=tuple(clone.state_dict()),
        aliases=aliases_of(clone),
        output=traced.output,
        way=traced.way,
        unkept=traced.unkept,
        doubtful=traced.doubtful,
        walked=traced.walked,
        unseen=traced.unseen,
        experts=experts,
        untrainable=tuple(untrainable),
        symbolic=traced.symbolic,
    )


def _unknown_calls(model: nn.Module) -> Reason:
    return Reason(
        ReasonCode.MUTATED_STATE,
        "forward can be traced, but not be run here at any short length, so nobody knows whether "
        "its result depends on earlier calls",
        forward_line(model),
        "port it where forward runs on the parameters' own device",
    )


def ready(clone: nn.Module) -> str:
    """Lets a clone be traced; which implementation of experts was replaced for that, or ""."""
    off_meta(clone)
    without_cache(clone)
    plain_outputs(clone)
    return experts_by_row(clone)


def _frozen(model: nn.Module, dtype: torch.dtype | None) -> frozenset[str] | None:
    """See `trace_at_lengths`."""
    still = [n for n, p in model.named_parameters() if not p.requires_grad]
    if still and dtype is not None:
        return None
    return frozenset(n for n in still if not model.get_parameter(n).is_meta)


def _is_in_pieces(symbolic: Traced) -> bool:
    """Whether the length is divided, or filled up to a multiple: plain lengths say what that is."""
    values = (n.meta.get("val") for n in symbolic.graph.graph.nodes)
    sizes = (s for v in values if isinstance(v, torch.Tensor) for s in shape_of_tensor(v))
    return any(
        isinstance(s, sympy.Expr) and any(f.has(symbolic.length) for f in s.atoms(sympy.Function))
        for s in sizes
    )


def _trace(
    clone: nn.Module,
    *,
    every_pair: bool,
    plain: bool,
    needed: int,
    most: int | None,
    frozen: frozenset[str] | None,
) -> Traced:
    """Symbolically where that holds for every length, else at several plain lengths."""
    at_lengths = functools.partial(
        trace_at_lengths, clone, every_pair=every_pair, needed=needed, most=most, frozen=frozen
    )
    if plain:
        return at_lengths()
    shown = 0
    refused: PortError | None = None
    try:
        symbolic = trace_symbolically(clone, every_pair=every_pair, needed=needed)
        shown = symbolic.shown
        if _is_in_pieces(symbolic):
            try:
                return at_lengths(shown=shown)
            except PortError as error:  # what stays in pieces is said of the symbols
                refused = error
        if symbolic.shortest == 2:
            if symbolic.limit is None or not continues(clone, symbolic.limit):
                return symbolic
            one_more = trace_one_more(clone, symbolic, symbolic.limit)
            if one_more is not None:
                return one_more
    except PortError:  # plain lengths cope with more; what they cannot cope with, they say
        pass
    if refused is not None:
        raise refused
    return at_lengths(shown=shown)
