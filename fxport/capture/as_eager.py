"""What forward asks about being traced is answered as if nobody traced it.

    if not torch.compiler.is_compiling() and T > 4096:      is_compiling() is False here: the
        x = x * self.scale                                  question about T is seen, and answered

Torch and Python go on being told the truth. Files that hold the functions under names of their
own (``from torch.compiler import is_compiling``) are given ours for the time of a trace.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from fxport.capture.location import is_library
from fxport.capture.memos import files_around

__all__ = ["asked_as_eager"]

_QUESTIONS = ("is_compiling", "is_exporting")
_WHERE = ("torch.compiler", "torch._dynamo", "torch._dynamo.external_utils", "torch._utils")


@contextmanager
def asked_as_eager(model: nn.Module) -> Iterator[None]:
    """For the time of a trace."""
    places = [vars(sys.modules[name]) for name in _WHERE if name in sys.modules]
    asked = {f: _eager(f) for names in places for q in _QUESTIONS if callable(f := names.get(q))}
    places += [vars(file) for file in files_around(model)]
    held = [(names, k, v) for names in places for k, v in names.items() if _is_one(v, asked)]
    for names, key, function in held:
        names[key] = asked[function]
    try:
        yield
    finally:
        for names, key, function in held:
            names[key] = function


def _is_one(value: Any, functions: dict[Callable[..., Any], Any]) -> bool:
    return type(value) is type(_eager) and value in functions


def _eager(question: Callable[..., bool]) -> Callable[..., bool]:
    @functools.wraps(question)
    def answer() -> bool:
        return is_library(sys._getframe(1).f_code.co_filename) and question()

    return answer
