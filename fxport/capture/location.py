"""From a graph node back to the user's line and module."""

from __future__ import annotations

import linecache
import re
import sysconfig
from pathlib import Path

import torch
from torch import fx

from fxport.errors import Location

__all__ = ["module_of", "user_location"]

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)')
_TORCH = str(Path(torch.__file__).parent)
_STDLIB = sysconfig.get_path("stdlib")


def _is_library(file: str) -> bool:
    return file.startswith(_TORCH) or (
        file.startswith(_STDLIB) and "site-packages" not in file
    )


def location_in(stack_trace: str) -> Location | None:
    """The innermost frame of a printed stack that is neither torch's nor the standard library's."""
    frames = [m.groupdict() for m in _FRAME.finditer(stack_trace)]
    for frame in reversed(frames):
        file, line = frame["file"], int(frame["line"])
        if not _is_library(file):
            source = linecache.getline(file, line).strip()
            return Location(file, line, frame["function"], source)
    return None


def user_location(node: fx.Node) -> Location | None:
    """Where in the user's code this node was made; None when the capture recorded no stack."""
    trace = node.meta.get("stack_trace")
    return location_in(trace) if trace else None


def module_of(node: fx.Node) -> str:
    """Qualified name of the innermost user module around this node, or ""."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path, _ = list(stack.values())[-1]
    return path.removeprefix("L['self'].").removeprefix("L['self']")
