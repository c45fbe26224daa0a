"""Whoever asks whether it is traced, by whatever name, is found out."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from fxport.capture.clone import clone_for_capture
from fxport.capture.lengths import trace_at_lengths
from fxport.capture.paths import followed
from fxport.capture.sample import take_sample
from fxport.capture.symbolic import trace_symbolically
from fxport.capture.walk import plain_path
from fxport.errors import PortError, ReasonCode
from tests.capture import counted_beside
from tests.zoo.called import Tiny


class Asks(Tiny):
    """The logits twice where `when` says so."""

    def __init__(self, when: Callable[[Tensor, Any], Any]) -> None:
        super().__init__()
        self.when = when

    def forward(self, ids: Tensor) -> Tensor:
        logits = super().forward(ids)
        return logits * 2 if self.when(logits, ids.shape[1]) else logits


def without_fail(_: Tensor, length: Any) -> bool:
    try:
        return bool(length.bit_length() > 6)
    except AttributeError:
        return False


# A length against a symbol: the graphs of plain lengths differ.
SIZES: dict[str, Callable[[Tensor, Any], Any]] = {
    "isinstance": lambda x, n: isinstance(n, int) and n > 60,
    "type": lambda x, n: type(n) is int and n > 60,
    "an attribute": lambda x, n: not hasattr(n, "node") and n > 60,
    "a failure": without_fail,
    "a remainder": lambda x, n: isinstance(n, int) and n % 41 == 0 and n > 70,
}
# A tensor against a trace's, or the trace itself.
TRACES: dict[str, Callable[[Tensor, Any], Any]] = {
    "type": lambda x, n: type(x) is Tensor and n > 60,
    "class": lambda x, n: x.__class__ is Tensor and n > 60,
    "fake": lambda x, n: not isinstance(x, torch._subclasses.FakeTensor) and n > 60,
    "last": lambda x, n: n > 60 and type(x) is Tensor,
    "fx": lambda x, n: not torch.fx._symbolic_trace.is_fx_tracing() and n > 60,
    "frames": lambda x, n: all("export" not in f.filename for f in inspect.stack(0)) and n > 60,
}
# Modes and contexts, as a plain call has none.
ACTIVE: dict[str, Callable[[], Any]] = {
    "dispatch modes": lambda: _get_current_dispatch_mode_stack(),
    "function modes": lambda: torch.overrides._get_current_function_mode_stack(),
    "how many": lambda: torch._C._len_torch_dispatch_stack(),
    "a context": lambda: torch._guards.TracingContext.try_get(),
    "fx": lambda: torch.fx._symbolic_trace.is_fx_tracing(),
    "proxies": lambda: torch.fx.experimental.proxy_tensor.get_proxy_mode(),
    "shapes": lambda: torch._guards.detect_fake_mode(),
    "overridden": lambda: torch.overrides.has_torch_function((torch.zeros(1),)),
}
# The same answer in a trace.
ALIKE: dict[str, Callable[[Tensor, Any], Any]] = {
    "device": lambda x, n: x.device.type == "meta" or x.is_meta or not x.is_cpu,
    "tracer": lambda x, n: sys.gettrace() is not None,
    "scripting": lambda x, n: torch.jit.is_scripting() or torch.jit.is_tracing(),
    "gradient": lambda x, n: torch.is_grad_enabled() or x.requires_grad,
    "parameter": lambda x, n: not isinstance(x, Tensor) or isinstance(x, torch.nn.Parameter),
}


@pytest.mark.parametrize("when", SIZES.values(), ids=SIZES)
def test_a_symbol_is_told_from_a_number(when: Callable[[Tensor, Any], Any]) -> None:
    clone = clone_for_capture(Asks(when).eval())
    with pytest.raises(PortError):
        trace_symbolically(clone)
    with pytest.raises(PortError) as caught:
        trace_at_lengths(clone)
    assert caught.value.reasons[0].code is ReasonCode.DEPENDS_ON_LENGTH


@pytest.mark.parametrize("when", TRACES.values(), ids=TRACES)
def test_a_trace_is_told_from_a_call(when: Callable[[Tensor, Any], Any]) -> None:
    with pytest.raises(PortError) as caught:
        trace_at_lengths(clone_for_capture(Asks(when).eval()))
    location = caught.value.reasons[0].location
    assert location is not None and location.file == __file__
    assert "n > 60" in location.source or "self.when(" in location.source


@pytest.mark.parametrize("when", ALIKE.values(), ids=ALIKE)
def test_what_has_one_answer_is_captured(when: Callable[[Tensor, Any], Any]) -> None:
    assert trace_symbolically(clone_for_capture(Asks(when).eval())).symbolic


@pytest.mark.parametrize("active", ACTIVE.values(), ids=ACTIVE)
def test_modes_are_those_of_a_plain_call(active: Callable[[], Any]) -> None:
    """The length is asked about in either case, and answered."""
    traced = Asks(lambda x, n: bool(active()) and n > 60)
    assert trace_symbolically(clone_for_capture(traced.eval())).limit == 96
    plain = Asks(lambda x, n: (n > 60) & (not active()))
    assert trace_symbolically(clone_for_capture(plain.eval())).limit == 60
    assert not active()


class Beside(Tiny):
    def forward(self, ids: Tensor) -> Tensor:
        return counted_beside.untraced(super().forward(ids), ids.shape[1])


def test_a_file_without_modules_is_answered_as_eager() -> None:
    """The length is asked about, so the graph holds up to there."""
    assert trace_symbolically(clone_for_capture(Beside().eval())).limit == 60


def test_what_forward_asks_about_tokens_has_no_path_of_its_own() -> None:
    chosen = Asks(lambda x, n: bool((x > 0).any()))
    assert plain_path(clone_for_capture(chosen.eval()), 1, 7) is None


def test_the_tracer_of_others_is_put_back_and_seen() -> None:
    def others(*_: Any) -> None:
        return None

    before = sys.gettrace()
    sys.settrace(others)
    try:
        with followed():
            assert sys.gettrace() is others
        assert sys.gettrace() is others
    finally:
        sys.settrace(before)


def test_earlier_calls_are_followed_too() -> None:
    clone = clone_for_capture(Asks(lambda x, n: False).eval())
    (path,) = {tuple(p.steps) for p in take_sample(clone, 2, 7, (5,)).paths}
    plain = plain_path(clone, 2, 7, (5,))
    assert plain is not None and tuple(plain.steps) == path
