"""Whether what a function draws at random decides only whether it raises.

    number = getrandbits(32)                                a check of types around a forward
    if not isinstance(items[number % len(items)], float):
        raise TypeError(number)
    return function(*args)                                  the same, whatever was drawn

The function's instructions are followed, for there may be no source. What was drawn, and what is
made of it, may be kept in local variables and asked about. It may not be returned, stored elsewhere
or given to a call. Where it decides a branch, one side always raises, or nothing but such questions
stands between the branch and the place where both sides meet.
"""

from __future__ import annotations

import dis
import functools
import inspect
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import CodeType

__all__ = ["only_checks", "passes_on", "questions_among"]

# What a value on the stack is: made of what was drawn; a function that only asks.
_DRAWN, _ASKS = 1, 2
# Functions of Python's own that only ask.
_QUESTIONS = frozenset({"isinstance", "issubclass", "len", "type", "callable", "bool", "int"})
# How many values an instruction takes that computes one from them, and does nothing else.
_COMPUTES = {
    "BINARY_OP": 2,
    "BINARY_SLICE": 3,
    "BINARY_SUBSCR": 2,
    "COMPARE_OP": 2,
    "CONTAINS_OP": 2,
    "IS_OP": 2,
    "LOAD_ATTR": 1,
    "TO_BOOL": 1,
    "UNARY_INVERT": 1,
    "UNARY_NEGATIVE": 1,
    "UNARY_NOT": 1,
}
_FIRST_INPLACE = 13  # from here on BINARY_OP may change its operand
_LOADS = frozenset({"LOAD_CONST", "LOAD_DEREF", "LOAD_GLOBAL", "PUSH_NULL"})
_NOTHING = frozenset({"EXTENDED_ARG", "KW_NAMES", "NOP", "PRECALL", "RESUME"})
_JUMPS = frozenset({"JUMP_BACKWARD", "JUMP_FORWARD"})
_ENDS = frozenset({"RAISE_VARARGS", "RERAISE", "RETURN_CONST", "RETURN_VALUE"})
_OTHERWISE = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR


class _UnclearError(Exception):
    """Something that is not followed."""


@dataclass(frozen=True)
class _State:
    """Before an instruction: the stack, and the local variables that hold what was drawn."""

    stack: tuple[int, ...] = ()
    drawn: frozenset[str] = frozenset()

    def taken(self, count: int) -> tuple[_State, tuple[int, ...]]:
        if count > len(self.stack):
            raise _UnclearError
        left = len(self.stack) - count
        return _State(self.stack[:left], self.drawn), self.stack[left:]

    def given(self, *values: int) -> _State:
        return _State((*self.stack, *values), self.drawn)

    def joined(self, other: _State) -> _State:
        if len(self.stack) != len(other.stack):
            raise _UnclearError
        both = zip(self.stack, other.stack, strict=True)
        stack = tuple((a | b) & _DRAWN | (a & b) & _ASKS for a, b in both)
        return _State(stack, self.drawn | other.drawn)


@functools.lru_cache(maxsize=256)
def only_checks(code: CodeType, draws: frozenset[int], questions: frozenset[str]) -> bool:
    """
    Args:
        draws: offsets of the calls that draw, or within them.
        questions: names of globals that are functions of `questions_among`.

    Returns:
        Whether all that is drawn there decides nothing but whether the function raises.
    """
    if code.co_flags & _OTHERWISE or code.co_exceptiontable:
        return False  # what it raises might be caught
    try:
        _Followed(code, draws, questions).follow()
    except _UnclearError:
        return False
    return True


def questions_among(names: Mapping[str, object]) -> frozenset[str]:
    """Those of Python's functions that only ask, where no global of a file has their name."""
    return _QUESTIONS.difference(names)


def passes_on(code: CodeType, offset: int) -> bool:
    """Whether an error that is raised there leaves the function; ``with`` is taken to let it."""
    ways = _Ways(code)
    entries = dis.Bytecode(code).exception_entries  # type: ignore[attr-defined]  # it is there
    handlers = [e.target for e in entries if e.start <= offset < e.end]
    opened = {o: ways.of[ways.after[o]].opname == "WITH_EXCEPT_START" for o in handlers}
    return all(opened[o] or o not in ways.goes_on for o in handlers)


class _Ways:
    """The instructions of a function by offset, and which may come after each."""

    def __init__(self, code: CodeType) -> None:
        self.of = {i.offset: i for i in dis.get_instructions(code)}
        offsets = list(self.of)
        self.after = dict(itertools.pairwise(offsets))
        self.next = {i.offset: tuple(_targets(i, self.after)) for i in self.of.values()}
        # where a return is in reach; from elsewhere it raises, whatever it does before
        self.goes_on = {i.offset for i in self.of.values() if i.opname.startswith("RETURN")}
        while more := {
            o for o in offsets if o not in self.goes_on and self.goes_on.intersection(self.next[o])
        }:
            self.goes_on |= more


class _Followed:
    """What is known before each instruction of a function."""

    def __init__(self, code: CodeType, draws: frozenset[int], questions: frozenset[str]) -> None:
        ways = _Ways(code)
        self.of, self.goes_on = ways.of, ways.goes_on
        self.next = {o: tuple(n for n in to if n in self.goes_on) for o, to in ways.next.items()}
        self.draws = {max(o for o in self.of if o <= draw) for draw in draws}
        self.questions = questions
        if any(self.of[draw].opname != "CALL" for draw in self.draws):
            raise _UnclearError
        self.hanging: set[int] = set()  # run or not as what was drawn decides

    def follow(self) -> None:
        """
        Raises:
            _UnclearError: something is not followed, or shows what was drawn.
        """
        while True:
            known = len(self.hanging)
            states = {next(iter(self.of)): _State()}
            pending = list(states)
            while pending:
                offset = pending.pop()
                for target, state in self._step(offset, states[offset]):
                    before = states.get(target)
                    joined = state if before is None else before.joined(state)
                    if joined != before:
                        states[target] = joined
                        pending.append(target)
            if len(self.hanging) == known:
                return

    def _step(self, offset: int, state: _State) -> Iterator[tuple[int, _State]]:
        """What is known before each instruction that may come next."""
        instruction, targets = self.of[offset], self.next[offset]
        name, number = instruction.opname, instruction.arg or 0
        hangs = _DRAWN if offset in self.hanging else 0
        if name.startswith(("POP_JUMP_", "JUMP_IF_")):
            yield from self._branch(instruction, state)
            return
        if name == "FOR_ITER":
            yield from self._loop(instruction, state, hangs)
            return
        if name in ("LOAD_FAST", "LOAD_FAST_CHECK"):
            held = _DRAWN if instruction.argval in state.drawn else 0
            state = state.given(held | hangs)
        elif name == "STORE_FAST":
            state, (value,) = state.taken(1)
            held_now = {instruction.argval}
            drawn = (value | hangs) & _DRAWN
            names = state.drawn | held_now if drawn else state.drawn - held_now
            state = _State(state.stack, names)
        elif name in _LOADS:
            asks = _ASKS if name == "LOAD_GLOBAL" and instruction.argval in self.questions else 0
            state = state.given(
                *[asks | hangs] * dis.stack_effect(instruction.opcode, instruction.arg)
            )
        elif name in _COMPUTES and not (name == "BINARY_OP" and number >= _FIRST_INPLACE):
            state, values = state.taken(_COMPUTES[name])
            made = _COMPUTES[name] + dis.stack_effect(instruction.opcode, instruction.arg)
            state = state.given(*[_any_drawn(values) | hangs] * made)
        elif name == "CALL":
            state = self._called(offset, number, state, hangs)
        elif name == "POP_TOP":
            state, _ = state.taken(1)
        elif name in ("COPY", "SWAP"):
            state = _moved(name, number, state, hangs)
        elif name not in _NOTHING | _JUMPS:
            state = _anything_else(instruction, state, hangs)
        yield from ((target, state) for target in targets)

    def _called(self, offset: int, count: int, state: _State, hangs: int) -> _State:
        state, values = state.taken(count + 2)  # the function stands in one of two places
        drawn = _any_drawn(values) | hangs
        if drawn and not (values[0] | values[1]) & _ASKS:
            raise _UnclearError
        return state.given(_DRAWN if offset in self.draws else drawn)

    def _loop(
        self, instruction: dis.Instruction, state: _State, hangs: int
    ) -> Iterator[tuple[int, _State]]:
        """How often may not hang on what is drawn."""
        if hangs or _any_drawn(state.stack):
            raise _UnclearError
        for target in self.next[instruction.offset]:
            jump = target == instruction.argval
            effect = dis.stack_effect(instruction.opcode, instruction.arg, jump=jump)
            yield target, _State((0,) * (len(state.stack) + effect), state.drawn)

    def _branch(self, instruction: dis.Instruction, state: _State) -> Iterator[tuple[int, _State]]:
        """What is drawn may decide it where one side raises, or little hangs on it."""
        without, (value,) = state.taken(1)
        targets = self.next[instruction.offset]
        if (value & _DRAWN or instruction.offset in self.hanging) and len(set(targets)) > 1:
            self.hanging |= self._before_they_meet(targets)
        for target in targets:
            kept = instruction.opname.endswith("_OR_POP") and target == instruction.argval
            yield target, state if kept else without

    def _before_they_meet(self, targets: tuple[int, ...]) -> set[int]:
        """What comes after some of `targets`, up to what comes after all of them on every way."""
        meeting = set.intersection(*(self._on_every_way(t) for t in targets))
        found: set[int] = set()
        pending = [t for t in targets if t not in meeting]
        while pending:
            offset = pending.pop()
            found.add(offset)
            pending += [n for n in self.next[offset] if n not in meeting | found]
        return found

    def _on_every_way(self, start: int) -> set[int]:
        """What no way from `start` to a return leaves out."""
        return {o for o in self.goes_on if o == start or not self._returns(start, without=o)}

    def _returns(self, start: int, without: int) -> bool:
        seen, pending = {without}, [start]
        while pending:
            offset = pending.pop()
            if offset not in seen:
                seen.add(offset)
                if not self.next[offset]:
                    return True
                pending += self.next[offset]
        return False


def _targets(instruction: dis.Instruction, after: dict[int, int]) -> Iterator[int]:
    if instruction.opcode in {*dis.hasjrel, *dis.hasjabs}:
        yield instruction.argval
    if instruction.opname not in _ENDS | _JUMPS and instruction.offset in after:
        yield after[instruction.offset]


def _any_drawn(values: tuple[int, ...]) -> int:
    return functools.reduce(int.__or__, values, 0) & _DRAWN


def _moved(name: str, number: int, state: _State, hangs: int) -> _State:
    state, values = state.taken(number)
    values = tuple(v | hangs for v in values)
    if name == "COPY":
        return state.given(*values, values[0])
    return state.given(values[-1], *values[1:-1], values[0])


def _anything_else(instruction: dis.Instruction, state: _State, hangs: int) -> _State:
    """It may do anything, and does not see what was drawn."""
    special = {*dis.hasjrel, *dis.hasjabs, *dis.haslocal}
    if hangs or _any_drawn(state.stack) or instruction.opcode in special:
        raise _UnclearError
    size = len(state.stack) + dis.stack_effect(instruction.opcode, instruction.arg)
    return _State((0,) * size, state.drawn)
