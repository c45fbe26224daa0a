"""What forward draws from Python's random numbers, and whether its result can hang on them.

@beartype                               draws which item of a list it checks: either it raises,
def forward(self, scales: list[float])  or the call goes on as if nothing had been drawn
...
keep = random.random() < 0.9            the result hangs on it
"""

from __future__ import annotations

import random
import sys
import traceback
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

from torch.overrides import TorchFunctionMode

from fxport.capture.location import is_library
from fxport.capture.only_checks import only_checks, passes_on, questions_among

__all__ = ["Draws", "drawn_by_python", "noting_draws"]

_GENERATOR = random.random.__self__  # type: ignore[attr-defined]
# They draw, and change nothing else.
_DRAWS = frozenset({"choice", "getrandbits", "randint", "random", "randrange", "uniform"})
_INSTALLED = "site-packages"


@dataclass
class Draws:
    """Whether all that was drawn since decides only what is checked."""

    only_to_check: bool = True


def drawn_by_python() -> object:
    """Another value where something was drawn in between."""
    return random.getstate()


@contextmanager
def noting_draws() -> Iterator[Draws]:
    """Looks at everything that is drawn meanwhile, but for what torch's own functions draw."""
    draws = Draws()
    outside = frozenset(frame for frame, _ in traceback.walk_stack(None))

    def seen(frame: FrameType, event: str, called: Any) -> None:
        if event == "c_call" and getattr(called, "__self__", None) is _GENERATOR:
            draws.only_to_check &= called.__name__ == "getstate" or _only_to_check(
                frame, called.__name__, outside
            )

    before = sys.getprofile()
    sys.setprofile(seen)
    try:
        with _Unseen(draws):
            yield draws
            draws.only_to_check &= sys.getprofile() is seen  # nobody else watches instead
    finally:
        sys.setprofile(before)


class _Unseen(TorchFunctionMode):
    """What torch does in a call is not watched: that takes long, and nothing is drawn there."""

    def __init__(self, draws: Draws) -> None:
        super().__init__()
        self._draws = draws

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        watching, before = sys.getprofile(), drawn_by_python()
        sys.setprofile(None)
        try:
            return func(*args, **(kwargs or {}))
        finally:
            sys.setprofile(watching)
            self._draws.only_to_check &= drawn_by_python() == before


def _only_to_check(frame: FrameType | None, name: str, outside: Container[FrameType]) -> bool:
    """Whether the function that calls for a random number uses it for nothing else."""
    while frame is not None and frame.f_code.co_filename == random.__file__:
        name, frame = frame.f_code.co_name, frame.f_back
    if frame is None or name not in _DRAWS or _caught(frame.f_back, outside):
        return False
    draws = frozenset({frame.f_lasti})
    return only_checks(frame.f_code, draws, questions_among(frame.f_globals))


def _caught(frame: FrameType | None, outside: Container[FrameType]) -> bool:
    """Whether the user's code would go on after an error; packages pass on what they raise."""
    while frame is not None and frame not in outside:
        file = frame.f_code.co_filename
        own = not is_library(file) and _INSTALLED not in file
        if own and not passes_on(frame.f_code, frame.f_lasti):
            return True
        frame = frame.f_back
    return False
