"""The graph holds for every number of rows: shown where forward asks about it, or refused.

if x.shape[0] == 1:     ->  samples of 2 rows and of 1 row are compared

Torch takes a size that may vary for two or more, and answers questions about it accordingly,
without a guard. What it asks itself (may this be broadcast?) says nothing about the user's code.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import sympy
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental import sym_node
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from fxport.capture import rephrase
from fxport.capture.emitter import symbolic_tokens
from fxport.capture.location import is_library, watches
from fxport.capture.questions import answer, by_shapes, near, numbers_in
from fxport.capture.sample import device_of, take_sample
from fxport.capture.trace import quiet
from fxport.capture.unify import NeedsTable, unify
from fxport.errors import PortError, Reason, ReasonCode

__all__ = ["Question", "asked_about", "asked_about_rows", "require_every_batch", "user_questions"]

_ROWS = 2
_EACH = range(1, 17)  # numbers of rows that every question is asked about
_MOST = 4
_UNHEARD = ("", 0, "")


@dataclass(frozen=True)
class Question:
    """What a line of the user's asks about sizes."""

    asked: sympy.Basic
    line: tuple[str, int, str]  # file, number, function

    def otherwise(self, size: sympy.Symbol, one: int, other: int) -> bool:
        """Whether two sizes get different answers, as far as it is about this size alone."""
        if self.asked.free_symbols != {size}:
            return False
        return answer(self.asked, size, one) != answer(self.asked, size, other)


@contextmanager
def user_questions() -> Iterator[list[Question]]:
    """What the user's own lines ask about sizes, as they ask it.

    Of a size that is taken as a plain number nobody sees what is asked: whether it is 1, say.
    """
    found: list[Question] = []
    asking: dict[tuple[Any, str], Callable[[Any], sympy.Basic]] = {
        (torch.SymBool, "__bool__"): lambda asked: asked,
        (torch.SymBool, "__int__"): lambda asked: asked,  # ``1 + (T > 4)``, too
        (torch.SymFloat, "__bool__"): lambda number: sympy.Ne(number, 0),
        (torch.SymFloat, "__int__"): lambda number: number,
        (torch.SymInt, "__bool__"): lambda size: sympy.Ne(size, 0),
        (torch.SymInt, "__int__"): lambda size: sympy.Eq(size, 1),
        (torch.SymInt, "__index__"): lambda size: sympy.Eq(size, 1),
    }
    own = {(cls, name): getattr(cls, name) for cls, name in asking}

    def noting(key: tuple[Any, str]) -> Callable[[Any], Any]:
        def asked(value: Any) -> Any:
            frame = _asking(sys._getframe(1))
            file = frame.f_code.co_filename
            if file.startswith("<") or not is_library(file):  # a model may be typed in
                line = file, frame.f_lineno, frame.f_code.co_name
                found.append(Question(asking[key](value.node.expr), line))
            return own[key](value)

        return asked

    try:
        for cls, name in asking:
            setattr(cls, name, noting((cls, name)))
        yield found
    finally:
        for (cls, name), method in own.items():
            setattr(cls, name, method)


def _asking(frame: FrameType) -> FrameType:
    """The frame that asks; of a call that is said in other words, the one that made it.

    Arithmetic takes a comparison for a number inside torch, on behalf of the line that has it.
    """
    while frame.f_code.co_filename == sym_node.__file__ and frame.f_back is not None:
        frame = frame.f_back
    if frame.f_code.co_filename == rephrase.__file__:
        while watches(frame) and frame.f_back is not None:
            frame = frame.f_back
    return frame


@dataclass(frozen=True)
class Heard:
    """What one run asked about the sizes of its tokens, by shapes alone.

    Attributes:
        rows, tokens: the symbols of B and T.
        whole: whether forward came to its end, without choosing among the tokens.
        failed: whether it raised: shapes were not enough, and nobody hears what it asks later.
    """

    questions: list[Question]
    rows: sympy.Symbol
    tokens: sympy.Symbol
    whole: bool
    failed: bool


def asked_about_rows(model: nn.Module, length: int) -> tuple[list[Question], sympy.Symbol]:
    """What forward asks about the number of rows, by shapes alone, and the symbol of it.

    Where shapes are not enough it may ask later whether there is one row, or how many of the
    numbers that its code names: these count as asked.
    """
    heard = asked_about(model, length, [DimDynamic.DYNAMIC, DimDynamic.STATIC])
    questions = list(heard.questions)
    if heard.failed:
        unheard = (1, *(n for n in numbers_in(model, _EACH[-1]) if n != _ROWS))
        questions += [Question(sympy.Eq(heard.rows, n), _UNHEARD) for n in unheard]
    return questions, heard.rows


def asked_about(model: nn.Module, length: int, sizes: Sequence[DimDynamic]) -> Heard:
    """What forward asks about those of rows and tokens that are dynamic."""
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    ids = torch.zeros(_ROWS, length, dtype=torch.long, device=device_of(model))
    rows, tokens, fake = symbolic_tokens(mode, ids, list(sizes))
    whole, failed = False, True
    failing = contextlib.suppress(Exception)  # the samples say why
    with user_questions() as found, by_shapes(model, mode) as selected, failing:
        model(fake)
        whole, failed = not selected.answered, False
    return Heard(found, rows, tokens, whole, failed)


def require_every_batch(
    model: nn.Module, questions: list[Question], rows: sympy.Symbol, length: int
) -> None:
    """Shows that `model` computes a row alike, however many there are.

    Args:
        model: a clone from `clone_for_capture`.
        questions: what forward asks about sizes.
        rows: the symbol of the number of rows.
        length: a sequence length that forward takes.

    Raises:
        PortError: it asks, and computes something else.
    """
    taken = functools.partial(_takes, model, length)
    with quiet():
        others = _answered_otherwise(questions, rows, length, taken)
        if not others:
            return
        # Of two samples alone, a 2 and a 1 would be taken for the number of rows.
        more = (n for n in _EACH if n > _ROWS and n not in others and taken(n))
        batches = (_ROWS, *others, *itertools.islice(more, 1))
    tried = ", ".join(map(str, others))
    try:
        unify([take_sample(model, batch, length) for batch in batches])
    except PortError as error:
        raise PortError([_refusal(reason, tried) for reason in error.reasons]) from error
    except NeedsTable as error:
        raise PortError([_refusal(None, tried)]) from error


def _refusal(found: Reason | None, tried: str) -> Reason:
    said = f": {found.message}" if found else ""
    return Reason(
        ReasonCode.DEPENDS_ON_BATCH,
        f"rows are computed otherwise in a batch of {tried} than in one of {_ROWS}{said}",
        found.location if found else None,
        "the result of a row must not depend on how many rows there are",
    )


def _takes(model: nn.Module, length: int, rows: int) -> bool:
    """False where a line of the user's refuses so many rows, by shapes alone.

    assert B <= self.max_batch_size         beyond it forward computes nothing
    """
    ids = torch.zeros(rows, length, dtype=torch.long, device=device_of(model))
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv(), static_shapes=True)
    with by_shapes(model, mode):
        try:
            model(mode.from_tensor(ids))
        except Exception as error:
            *_, (frame, _) = traceback.walk_tb(error.__traceback__)
            return is_library(frame.f_code.co_filename)  # torch's: shapes were not enough
    return True


def _answered_otherwise(
    questions: list[Question], rows: sympy.Symbol, length: int, taken: Callable[[int], bool]
) -> list[int]:
    """Numbers of rows that forward takes, for which a question has another answer than for two.

    Args:
        length: where a question is about the number of tokens, too.
    """
    found: list[int] = []
    for asked in dict.fromkeys(q.asked for q in questions):
        question = asked.subs(dict.fromkeys(asked.free_symbols - {rows}, length))
        if question.free_symbols != {rows}:
            continue
        here = answer(question, rows, _ROWS)
        sizes = sorted({*_EACH, *near(question)})
        others = [n for n in sizes if answer(question, rows, n) != here]
        if not set(found) & set(others):
            found += [n for n in others if taken(n)][:1]
    return found[:_MOST]
