"""Whether the user's code does in a trace what it does in a plain call of the same size.

    if isinstance(T, int) and T > 4096:     traced, T is no int: `T > 4096` is not even asked
    if type(ids) is Tensor and ...          traced, it is another class

Every instruction of the user's files is noted, in a trace and in a run on shapes whose sizes are
plain numbers and whose tensors are plain ones. Where the two part, forward tells them apart.
"""

from __future__ import annotations

import dis
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode

from fxport.capture.location import is_library, location_at
from fxport.errors import Location, PortError, Reason, ReasonCode

__all__ = [
    "Path",
    "first_difference",
    "followed",
    "followed_calls",
    "joined",
    "refuse_another_path",
]

_INSTALLED = "site-packages"


class Path:
    """The instructions of the user's files, in order."""

    def __init__(self) -> None:
        self.steps: list[tuple[CodeType, int]] = []

    def _enter(self, frame: FrameType, event: str, _: Any) -> Any:
        file = frame.f_code.co_filename
        if is_library(file) or _INSTALLED in file:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return self._step

    def _step(self, frame: FrameType, event: str, _: Any) -> Any:
        if event == "opcode":
            self.steps.append((frame.f_code, frame.f_lasti))
        return self._step


class _Unseen(TorchFunctionMode):
    """What torch does in a call is not followed: that takes as long again."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        following = _gettrace()
        sys.settrace(None)
        try:
            return func(*args, **(kwargs or {}))
        finally:
            sys.settrace(following)


_gettrace = sys.gettrace


@contextmanager
def followed() -> Iterator[Path]:
    """Notes the path of what is called meanwhile."""
    path, before = Path(), _gettrace()
    sys.gettrace, asked = (lambda: before), sys.gettrace
    sys.settrace(path._enter)
    try:
        with _Unseen():
            yield path
    finally:
        sys.settrace(before)
        sys.gettrace = asked


@contextmanager
def followed_calls(model: nn.Module, paths: list[Path]) -> Iterator[None]:
    """Adds the path of every call of a clone's forward, without what its hooks do."""
    own, call = vars(model).get("forward"), model.forward

    @functools.wraps(call)
    def forward(*args: Any, **kwargs: Any) -> Any:
        with followed() as path:
            paths.append(path)
            return call(*args, **kwargs)

    vars(model)["forward"] = forward
    try:
        yield
    finally:
        del vars(model)["forward"]
        if own is not None:
            vars(model)["forward"] = own


def joined(paths: Sequence[Path]) -> Path:
    """One call after the other."""
    path = Path()
    for one in paths:
        path.steps += one.steps
    return path


def refuse_another_path(traced: Sequence[Path], plain: Path | None) -> None:
    """
    Args:
        traced: of the calls that a trace made; torch may make several, and memories are filled by
            the first.
        plain: None where it could not be run.

    Raises:
        PortError: none of them is the path of the plain call.
    """
    if plain is None or not traced or any(p.steps == plain.steps for p in traced):
        return
    reason = Reason(
        ReasonCode.CAPTURE_FAILED,
        "forward does something else while it is traced than in a plain call, from this line on",
        first_difference(traced[0], plain),
        "do not ask for the types of sizes or tensors, nor whether forward is traced",
    )
    raise PortError([reason])


def first_difference(one: Path, other: Path) -> Location | None:
    """The line of the last instruction that two paths have in common."""
    common = None
    for a, b in zip(one.steps, other.steps, strict=False):
        if a != b:
            break
        common = a
    if common is None:
        return None
    code, offset = common
    line = code.co_firstlineno
    for start, number in dis.findlinestarts(code):
        if start <= offset and number is not None:
            line = number
    return location_at(code.co_filename, line, code.co_name)
