"""What forward asks about the length, and the lengths on both sides of every answer.

if T > 64:          ->  64, 65
min(T, 128)         ->  128, 129
for i in range(T)   ->  T is taken as a plain number: what is asked about that, nobody sees
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

import sympy
import torch
from torch import nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode, is_fake
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils._sympy.functions import ToFloat
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from fxport.capture.emitter import symbolic_tokens
from fxport.capture.memos import files_around, nothing_remembered
from fxport.capture.moving import with_length
from fxport.capture.paths import Path, followed_calls, joined
from fxport.capture.row_numbers import lists_of_rows
from fxport.capture.sample import device_of
from fxport.capture.selected import EverySelected
from fxport.capture.state import State
from fxport.capture.trace import as_traced, quiet

__all__ = [
    "Asked",
    "Heard",
    "answer",
    "ask",
    "by_shapes",
    "first_change",
    "forward_only",
    "near",
    "numbers_in",
]

# A question that is no comparison of straight lines is asked at each length up to here.
_EACH = 1024
_FAR = 2**17
# How many changes of an answer that comes and goes (``T % 64 == 0``) are looked at; one with more
# than a few is asked at every length up to `_GOING`, and so many lengths are named.
_FIRST = 2
_FEW = 4
_GOING = 4096
_NAMED = 128
# What code keeps several numbers in: ``T in {64, 128}``.
_HOLDERS = (tuple, frozenset)


@dataclass(frozen=True)
class Asked:
    """What one run asked about the length.

    Attributes:
        of: each question in words, and neighbouring lengths that it answers differently.
        counted: whether the length was taken as a plain number, or forward failed half-way (a
            length as a key of a set), or chose among the tokens: nobody sees what is asked after
            that.
        going: lengths on both sides of answers that come and go: other questions may hang on them.
        path: what the user's code did; empty where another run was heard before.
    """

    of: Mapping[str, frozenset[int]]
    counted: bool
    going: frozenset[int]
    path: Path

    @property
    def sides(self) -> frozenset[int]:
        """Those of all questions."""
        return frozenset(n for sides in self.of.values() for n in sides)


Heard = tuple[list[sympy.Rel], sympy.Symbol, bool, Path]


def ask(
    model: nn.Module,
    hint: int,
    batch: int = 1,
    known: Container[str] = (),
    heard: dict[tuple[int, int], Heard] | None = None,
) -> Asked:
    """Runs forward on `batch` rows of `hint` tokens, by shapes alone.

    What was asked before forward failed counts. Where the length is taken as a plain number, two
    more lengths tell which numbers are made of it, see `fxport.capture.moving`.

    Args:
        known: questions in words that name no such number.
        heard: what was asked before by length and rows; added to. Neighbours ask the same again.
    """
    runs = {} if heard is None else heard

    def at(n: int) -> Heard:
        if (n, batch) not in runs:
            # what the user's code does takes as long to note, and is asked of the first alone
            runs[n, batch] = _heard(model, n, batch, following=not runs)
        return runs[n, batch]

    questions, length, counted, path = at(hint)
    if counted and any(str(q) not in known and _sides(q, length) for q in dict.fromkeys(questions)):
        for steps in ((1, 2), (-1, -2)):
            others = [at(hint + step)[0] for step in steps]
            if (moved := with_length(questions, others, steps, hint, length)) is not None:
                questions = moved
                break
    of: dict[str, frozenset[int]] = {}
    going: set[int] = set()
    for question in dict.fromkeys(questions):
        going |= _going(question, length)
        if not isinstance(question, sympy.Eq) or question.subs({length: hint}) != sympy.true:
            of[str(question)] = _sides(question, length)
    return Asked(of, counted, frozenset(going), path)


def _heard(model: nn.Module, hint: int, batch: int, *, following: bool) -> Heard:
    """The comparisons that are about the length alone, its symbol, and the rest of `Asked`."""
    shapes = _Open()
    mode = FakeTensorMode(shape_env=shapes, allow_non_fake_inputs=True)
    ids = torch.zeros(batch, hint, dtype=torch.long, device=device_of(model))
    _, length, fake = symbolic_tokens(mode, ids, [DimDynamic.STATIC, DimDynamic.DYNAMIC])
    shapes.sizes = {length: hint}
    counted = True
    # The sample at this length says what is wrong, if anything is.
    paths: list[Path] = []
    follow = followed_calls(model, paths) if following else contextlib.nullcontext()
    with by_shapes(model, mode) as selected, follow, contextlib.suppress(Exception):
        model(fake)
        counted = selected.answered  # else it came to its end: what it asked later was seen, too
    about = [q for q in shapes.questions if q.free_symbols == {length}]
    comparisons = [q for q in about if isinstance(q, sympy.Rel)]
    return comparisons, length, counted or len(comparisons) < len(about), joined(paths)


class _Open(ShapeEnv):
    """Answers every question about a size by the size there is, and learns nothing from it.

    Torch would take the length for that number once it was asked for as a number, and answer
    every later question without a word.
    """

    sizes: dict[sympy.Symbol, int] | None = None

    def __init__(self) -> None:
        super().__init__()
        self.questions: list[sympy.Basic] = []
        self._answers: dict[sympy.Basic, sympy.Basic] = {}  # every operation asks the same again

    def evaluate_expr(self, orig_expr: sympy.Basic, *args: Any, **kwargs: Any) -> sympy.Basic:
        found = self._answers.get(orig_expr)
        if found is None:
            if self.sizes is None or not orig_expr.free_symbols <= self.sizes.keys():
                return super().evaluate_expr(orig_expr, *args, **kwargs)
            found = self._answers[orig_expr] = orig_expr.subs(self.sizes)
        self.questions.append(orig_expr)
        return found


@functools.lru_cache(maxsize=1024)  # the runs and the captures of a model ask alike
def _sides(question: sympy.Rel, length: sympy.Symbol) -> frozenset[int]:
    """Neighbouring lengths with different answers; of an answer that comes and goes, some.

    Those near the numbers that the question names, and the first few.
    """
    ends = set(near(question))
    with quiet():
        pairs = _changes(question, length, _FAR)
    found = (p for i, p in enumerate(pairs) if i < _FIRST or ends.issuperset(p))
    return frozenset(n for pair in found for n in pair)


@functools.lru_cache(maxsize=1024)
def _going(question: sympy.Rel, length: sympy.Symbol) -> frozenset[int]:
    """Neighbouring lengths with different answers, of an answer that comes and goes."""
    with quiet():
        if len(_changes(question, length, _FAR)) <= _FEW:
            return frozenset()
        pairs = list(_among(question, length, range(2, _GOING + 1)))
    spread = pairs[:: -(-2 * len(pairs) // _NAMED)]
    return frozenset(n for pair in spread for n in pair)


def near(question: sympy.Basic) -> list[int]:
    """Sizes from 2 on, on both sides of every number that a question names."""
    numbers = {int(n) for n in question.atoms(sympy.Number) if n.is_finite}
    return sorted({n for number in numbers for n in range(number - 1, number + 3) if n > 1})


def first_change(
    answered: Iterable[sympy.Basic], length: sympy.Symbol, lower: int, longest: int | None
) -> int | None:
    """The largest length up to which all answers stay what they are at `lower`."""
    with quiet():
        found = [
            one
            for question in dict.fromkeys(answered)
            if question.free_symbols == {length}
            for one, _ in _changes(question, length, longest or _FAR)
            if one >= lower
        ]
    return min(found, default=None)


def _changes(question: sympy.Basic, length: sympy.Symbol, longest: int) -> list[tuple[int, int]]:
    """Neighbouring lengths from 2 to `longest` with different answers.

    A comparison of two straight lines changes its answer near where they meet, any other one
    anywhere: it is asked at every length up to `_EACH`, beyond that near the numbers that it names
    and at a grid of lengths.
    """
    if isinstance(question, sympy.Rel) and (meeting := _meeting(question, length)) is not None:
        return sorted(_among(question, length, range(max(meeting - 1, 2), meeting + 3)))
    found = set(_among(question, length, range(2, min(longest, _EACH) + 1)))
    found.update(_among(question, length, [n for n in near(question) if n <= longest]))
    low = _EACH
    while low < longest:
        high = min(low + low // 8, longest)
        if answer(question, length, low) != answer(question, length, high):
            found.add(_between(question, length, low, high))
        low = high
    return sorted(found)


def _between(question: sympy.Basic, length: sympy.Symbol, low: int, high: int) -> tuple[int, int]:
    """Neighbours with different answers between two lengths that have different ones."""
    first = answer(question, length, low)
    while high - low > 1:
        middle = (low + high) // 2
        same = answer(question, length, middle) == first
        low, high = (middle, high) if same else (low, middle)
    return low, high


def _meeting(question: sympy.Rel, length: sympy.Symbol) -> int | None:
    """The last length before two straight lines meet; None for other comparisons."""
    difference = (question.lhs - question.rhs).replace(ToFloat, lambda number: number)
    if not difference.is_polynomial(length) or sympy.degree(difference, length) != 1:
        return None
    return int(sympy.floor(-difference.subs({length: 0}) / difference.coeff(length, 1)))


def _among(
    question: sympy.Basic, length: sympy.Symbol, lengths: Iterable[int]
) -> Iterator[tuple[int, int]]:
    answers = ((n, answer(question, length, n)) for n in lengths)
    for (one, a), (other, b) in itertools.pairwise(answers):
        if other == one + 1 and a != b:
            yield one, other


class _Numbers(PythonReferenceAnalysis):
    """Torch's own maximum takes no numbers of sympy, and its rounding gives some."""

    @staticmethod
    def maximum(a: Any, b: Any) -> Any:
        return max(a, b)

    @staticmethod
    def minimum(a: Any, b: Any) -> Any:
        return min(a, b)


def answer(question: sympy.Basic, size: sympy.Symbol, number: int) -> object:
    """What a question says where `size` is `number`.

    In plain numbers: sympy's own substitution takes fifty times as long.
    """
    try:
        return sympy_interp(_Numbers, {size: number}, question)
    except ZeroDivisionError:  # nobody could ask this of such a size
        return None


@contextmanager
def forward_only(model: nn.Module) -> Iterator[None]:
    """Runs that leave no trace on the model."""
    state = State(model)
    try:
        with as_traced(model), nothing_remembered(model):
            yield
    finally:
        state.restore()


@contextmanager
def by_shapes(model: nn.Module, mode: FakeTensorMode) -> Iterator[EverySelected]:
    """Runs on tensors of `mode`, which have shapes and no numbers; yields what answers for them."""
    selected = EverySelected(is_fake)
    lists = lists_of_rows(selected.found)
    with forward_only(model), mode, enable_python_dispatcher(), selected, lists:
        yield selected


# --- plain numbers ---------------------------------------------------------------------------


def numbers_in(model: nn.Module, longest: int) -> tuple[int, ...]:
    """Whole numbers from 2 to `longest` that the model's code or attributes name.

    What a plain number may be compared with: the lengths there are worth a look.
    """
    found: set[int] = set()
    for values in (State(model).values(), *_constants(model)):
        held = (v for value in values for v in (value if type(value) in _HOLDERS else (value,)))
        found.update(n for n in held if type(n) is int)
    return tuple(sorted(n for n in found if 2 <= n <= longest))


def _constants(model: nn.Module) -> Iterator[Iterable[Any]]:
    """Globals, and what stands in the code, of the user's files that define the modules."""
    classes = dict.fromkeys(cls for module in model.modules() for cls in type(module).__mro__)
    own = {file.__name__: file for file in files_around(model)}
    owners: list[Any] = [c for c in classes if c.__module__ in own]  # some are in a function
    for file in own.values():
        yield vars(file).values()
        owners += [file, *(v for v in vars(file).values() if isinstance(v, type))]
    functions = (f for owner in dict.fromkeys(owners) for f in vars(owner).values())
    pending = [f.__code__ for f in functions if isinstance(f, FunctionType)]
    while pending:
        constants = pending.pop().co_consts
        pending += [c for c in constants if isinstance(c, CodeType)]
        yield constants
