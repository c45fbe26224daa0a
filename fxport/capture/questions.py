"""What forward asks about the length, and the lengths on both sides of every answer.

if T > 64:          ->  64, 65
min(T, 128)         ->  128, 129
for i in range(T)   ->  T is taken as a plain number: what is asked about that, nobody sees
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

import sympy
import torch
from torch import nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from fxport.capture.emitter import symbolic_tokens
from fxport.capture.location import is_library
from fxport.capture.sample import device_of
from fxport.capture.state import State
from fxport.capture.trace import as_traced

__all__ = ["Asked", "ask", "forward_only", "numbers_in"]


@dataclass(frozen=True)
class Asked:
    """What one run asked about the length.

    Attributes:
        sides: neighbouring lengths that are answered differently.
        counted: whether the length was taken as a plain number.
    """

    sides: frozenset[int]
    counted: bool


def ask(model: nn.Module, hint: int) -> Asked:
    """Runs forward on `hint` tokens, by shapes alone.

    Forward may fail half-way (a length as a dictionary key): what was asked before counts.
    """
    shapes = _Open()
    mode = FakeTensorMode(shape_env=shapes, allow_non_fake_inputs=True)
    ids = torch.zeros(1, hint, dtype=torch.long, device=device_of(model))
    _, length, fake = symbolic_tokens(mode, ids, [DimDynamic.STATIC, DimDynamic.DYNAMIC])
    shapes.sizes = {length: hint}
    # The sample at this length says what is wrong, if anything is.
    with forward_only(model), mode, enable_python_dispatcher(), contextlib.suppress(Exception):
        model(fake)
    sides: set[int] = set()
    counted = False
    for question in shapes.questions:
        if question.free_symbols != {length}:
            continue
        if not isinstance(question, sympy.Rel):
            counted = True
        elif not isinstance(question, sympy.Eq) or question.subs({length: hint}) != sympy.true:
            sides |= _flips(question, length)
    return Asked(frozenset(sides), counted)


class _Open(ShapeEnv):
    """Answers every question about a size by the size there is, and learns nothing from it.

    Torch would take the length for that number once it was asked for as a number, and answer
    every later question without a word.
    """

    sizes: dict[sympy.Symbol, int] | None = None

    def __init__(self) -> None:
        super().__init__()
        self.questions: list[sympy.Basic] = []

    def evaluate_expr(self, orig_expr: sympy.Basic, *args: Any, **kwargs: Any) -> sympy.Basic:
        if self.sizes is None or not orig_expr.free_symbols <= self.sizes.keys():
            return super().evaluate_expr(orig_expr, *args, **kwargs)
        self.questions.append(orig_expr)
        return orig_expr.subs(self.sizes)


def _flips(question: sympy.Rel, length: sympy.Symbol) -> set[int]:
    """Neighbouring lengths with different answers, near every number that the question names."""
    difference = question.lhs - question.rhs
    if difference.is_polynomial(length) and sympy.degree(difference, length) == 1:
        slope = difference.coeff(length, 1)
        near = {int(sympy.floor(-difference.subs({length: 0}) / slope))}
    else:
        near = {int(n) for n in difference.atoms(sympy.Integer)}
    found: set[int] = set()
    for number in near:
        candidates = [n for n in range(number - 1, number + 3) if n > 1]
        answers = [question.subs({length: n}) for n in candidates]
        for (one, a), (other, b) in itertools.pairwise(zip(candidates, answers, strict=True)):
            if a != b:
                found |= {one, other}
    return found


@contextmanager
def forward_only(model: nn.Module) -> Iterator[None]:
    """Runs that leave no trace on the model."""
    state = State(model)
    try:
        with as_traced():
            yield
    finally:
        state.restore()


# --- plain numbers ---------------------------------------------------------------------------


def numbers_in(model: nn.Module, longest: int) -> tuple[int, ...]:
    """Whole numbers from 2 to `longest` that the model's code or attributes name.

    What a plain number may be compared with: the lengths there are worth a look.
    """
    found: set[int] = set()
    for values in (State(model).values(), *_constants(model)):
        found.update(n for n in values if type(n) is int)
    return tuple(sorted(n for n in found if 2 <= n <= longest))


def _constants(model: nn.Module) -> Iterator[Iterable[Any]]:
    """Globals, and what stands in the code, of the user's files that define the modules."""
    names = {cls.__module__ for module in model.modules() for cls in type(module).__mro__}
    pending: list[CodeType] = []
    for file in filter(None, map(sys.modules.get, sorted(names))):
        if is_library(getattr(file, "__file__", None) or "<"):
            continue
        yield vars(file).values()
        owners = [file, *(v for v in vars(file).values() if isinstance(v, type))]
        functions = (f for owner in owners for f in vars(owner).values())
        pending += [f.__code__ for f in functions if isinstance(f, FunctionType)]
    while pending:
        constants = pending.pop().co_consts
        pending += [c for c in constants if isinstance(c, CodeType)]
        yield constants
