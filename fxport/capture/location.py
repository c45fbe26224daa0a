"""From a graph node back to the user's line and module.

torch.export keeps only the frames of functions named `forward`; `record_user_lines` notes the
innermost line of the user, helper functions included, on every node.
"""

from __future__ import annotations

import dis
import functools
import importlib.util
import inspect
import linecache
import re
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from traceback import FrameSummary
from types import FrameType
from typing import Any

import torch
import torch.fx.traceback as fx_traceback
from torch import fx
from torch.overrides import TorchFunctionMode

from fxport.capture.checkpoints import CHECKPOINTS, CheckpointCalls
from fxport.capture.metadata import METADATA, asked_plainly
from fxport.errors import Location

__all__ = [
    "asks_for_zero",
    "direct_caller",
    "forward_line",
    "is_library",
    "is_torch_or_own",
    "line_of_user",
    "location_at",
    "location_in",
    "location_of_stack",
    "module_of",
    "record_user_lines",
    "user_location",
    "watches",
]

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)')
_TORCH = str(Path(torch.__file__).parent)
_STDLIB = sysconfig.get_path("stdlib")
# In a checkout the parts of the package lie in folders of their own.
_OWN = tuple(
    str(path)
    for name in ("fxport", "fxport.passes", "fxport.backends")
    if (spec := importlib.util.find_spec(name)) is not None
    for path in spec.submodule_search_locations or ()
)
_CAPTURE = f"{__package__}."
# Notations: the line that uses them says more than theirs.
_NOTATIONS = tuple(
    str(Path(spec.origin).parent)
    for name in ("einops", "einx")
    if (spec := importlib.util.find_spec(name)) is not None and spec.origin
)
# Dynamo's name for the variable that holds the model: L['self'].blocks, G['model'].blocks
_ROOT = re.compile(r"^[LG]\['\w+'\]\.?")
_KEY = "fxport_line"


@functools.cache  # a trace asks for every frame below every call
def is_library(file: str) -> bool:
    """Whether a file belongs to torch, fxport, einops or the standard library."""
    if file.startswith((_TORCH, *_OWN, *_NOTATIONS, "<")):
        return True
    return file.startswith(_STDLIB) and "site-packages" not in file


def is_torch_or_own(file: str) -> bool:
    """Whether a file belongs to torch or fxport."""
    return file.startswith((_TORCH, *_OWN))


def watches(frame: FrameType) -> bool:
    """Whether a frame is of what stands between the user's call and torch during a trace."""
    file, _, function = _line_of(frame)
    return file.startswith(_OWN) or (is_library(file) and function == "__torch_function__")


class _UserLines(TorchFunctionMode):
    """Annotates every node made by a torch call with the user's line that made the call."""

    def __init__(self) -> None:
        super().__init__()
        self._checkpoints = CheckpointCalls()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in METADATA and not types:
            return asked_plainly(func, args, kwargs)
        noted = {_KEY: _calling_line(), CHECKPOINTS: self._checkpoints.running()}
        noted = {key: found for key, found in noted.items() if found}
        if not noted:
            return func(*args, **(kwargs or {}))
        with fx_traceback.annotate(noted):
            return func(*args, **(kwargs or {}))


def _calling_line() -> tuple[str, int, str] | None:
    """(file, line, function) of the innermost running frame of the user's code."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and is_library(frame.f_code.co_filename):
        frame = frame.f_back
    return None if frame is None else _line_of(frame)


def line_of_user(frame: FrameType | None, *, alone: bool = False) -> Location | None:
    """The line of the user's innermost running frame from `frame` on; with `alone`, only where
    nothing but what watches a trace is in between."""
    while frame is not None and (watches(frame) if alone else is_library(_line_of(frame)[0])):
        frame = frame.f_back
    if frame is None or is_library(frame.f_code.co_filename):
        return None
    return location_at(*_line_of(frame))


def direct_caller() -> tuple[str, int, str] | None:
    """The line that called the function which asks, if it is the user's and not a library's."""
    frame = sys._getframe(2)
    return None if is_library(frame.f_code.co_filename) else _line_of(frame)


def asks_for_zero() -> bool:
    """Whether the user's code only compares the result of its running call with 0.

    Read off the bytecode: what follows the call is ``== 0`` or the like, or a jump.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and is_library(frame.f_code.co_filename):
        frame = frame.f_back
    if frame is None:
        return False
    after = [i for i in dis.get_instructions(frame.f_code) if i.offset > frame.f_lasti]
    if after and after[0].opname == "CALL":  # Python 3.11 runs `len` at the PRECALL before it
        del after[0]
    if len(after) < 2:
        return False
    if after[0].opname.startswith("POP_JUMP") or after[0].opname in ("TO_BOOL", "UNARY_NOT"):
        return True
    return after[0].argval == 0 and after[1].opname == "COMPARE_OP"


def _line_of(frame: FrameType) -> tuple[str, int, str]:
    return frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name


def location_at(file: str, line: int, function: str) -> Location:
    """A location with its source line read from the file."""
    return Location(file, line, function, linecache.getline(file, line).strip())


def location_of_stack(stack: Sequence[FrameSummary]) -> Location | None:
    """The innermost of the user's frames in a stack that was recorded."""
    for frame in reversed(stack):
        if not is_library(frame.filename):
            return location_at(frame.filename, frame.lineno or 0, frame.name)
    return None


@contextmanager
def record_user_lines() -> Iterator[None]:
    """While active, traced nodes remember the user's line; see `user_location`."""
    with fx_traceback.preserve_node_meta(), _UserLines():
        yield


def location_in(stack_trace: str) -> Location | None:
    """The innermost frame of a printed stack that is neither torch's nor the standard library's."""
    frames = [m.groupdict() for m in _FRAME.finditer(stack_trace)]
    for frame in reversed(frames):
        file, line = frame["file"], int(frame["line"])
        if not is_library(file):
            return location_at(file, line, frame["function"])
    return None


def user_location(node: fx.Node) -> Location | None:
    """Where in the user's code this node was made; None when the capture recorded no stack."""
    noted = node.meta.get("custom", {}).get(_KEY)
    if noted is not None:
        return location_at(*noted)
    trace = node.meta.get("stack_trace")
    return location_in(trace) if trace else None


def forward_line(model: torch.nn.Module) -> Location | None:
    """Where the model's forward begins; None when it was made at a prompt."""
    # What was put around the model (`fxport.capture.adapt`) is in front of its own class.
    written = (vars(c)["forward"] for c in type(model).__mro__ if "forward" in vars(c))
    forward = next(f for f in written if not getattr(f, "__module__", "").startswith(_CAPTURE))
    # A decorator's own function may be in another file, or in none (beartype compiles one).
    forward = inspect.unwrap(forward)
    try:
        file = inspect.getsourcefile(forward)
        lines, first = inspect.getsourcelines(forward)
    except (OSError, TypeError):  # made at a prompt: there is no file to name
        return None
    return Location(file or "", first, "forward", lines[0].strip())


def module_of(node: fx.Node) -> str:
    """Qualified name of the innermost user module around this node, or ""."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path, _ = list(stack.values())[-1]
    return _ROOT.sub("", path)
