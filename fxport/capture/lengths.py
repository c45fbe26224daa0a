"""The second way in: capture at several plain lengths, and unify.

For models whose code asks what the length is: tables that grow, masks made row by row, another
path beyond a window. A plain length answers every such question; that the answers do not matter
is shown by the graphs of the lengths on either side of each.

model  ->  lengths that matter  ->  a `Sample` of each  ->  one symbolic graph
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace

import sympy
from torch import nn

from fxport.capture.batches import asked_about_rows, require_every_batch
from fxport.capture.causal_calls import masks_at_every_length
from fxport.capture.earlier_calls import (
    give_the_same,
    histories_of,
    refuse_carried,
    refuse_kept,
)
from fxport.capture.grouped_calls import groups_at_every_length
from fxport.capture.longest import UNBOUNDED, runs
from fxport.capture.longest import longest as longest_of
from fxport.capture.paths import refuse_another_path
from fxport.capture.questions import Asked, Heard, ask, first_change, numbers_in
from fxport.capture.recurrence import refuse_recurrence
from fxport.capture.sample import Sample, take_sample
from fxport.capture.sizes import at_sizes
from fxport.capture.trace import token_argument
from fxport.capture.traced import Traced
from fxport.capture.unify import NeedsTable, Unified, unify
from fxport.capture.walk import Walked, plain_path, walk
from fxport.capture.written import writes_to_state
from fxport.errors import PortError, Reason, ReasonCode

__all__ = ["trace_at_lengths", "trace_one_more"]

# Lengths that share no factors with each other or with usual feature sizes. The first gives the
# hints of the symbolic graph; 1 is checked with numbers, as many models treat it apart.
_LENGTHS = (37, 53, 41, 29, 23, 17, 11, 7, 5, 3)
_FEWEST = sorted(_LENGTHS)[2]  # a model that is served shorter ones is captured for these
_BATCHES = (2, 3, 4)  # few: a cache may have no more rows
# For longer tables no constant may be larger than this.
_MOST_BYTES = 2**31
# What a forward asks beyond this about the length is answered by numbers alone.
_MOST_PATHS = 24


def trace_one_more(model: nn.Module, symbolic: Traced, limit: int) -> Traced | None:
    """Captures a clone of which a symbolic graph holds up to `limit`, one less than it takes.

    Torch takes ``mask[:, :, :T, :T]`` for shorter than the mask. What forward asks below is known
    then to have one answer: up to `limit` the symbolic graph says what a trace would give, at two
    usual lengths and at `limit`. What is beyond is traced.

    Returns:
        None where forward takes still longer ones, or the graphs differ.
    """
    usual = [n for n in _LENGTHS if n < limit][:2]
    if len(usual) < 2 or runs(model, limit + 2, limit):
        return None
    below = (*usual, limit)
    try:
        samples = [at_sizes(symbolic, _batch(n), n) for n in below]
        samples.append(take_sample(model, _batch(limit + 1), limit + 1))
        samples.append(take_sample(model, 1, limit + 1))  # ``T > limit * B`` is asked there alone
        unified, longest = _unified(model, samples, (), limit + 1)
    except (PortError, NeedsTable):  # every question that forward asks is looked at instead
        return None
    traced = _traced(unified, samples[0], (*below, limit + 1), longest)
    return replace(traced, symbolic=True)


def trace_at_lengths(
    model: nn.Module,
    *,
    every_pair: bool = True,
    needed: int = 0,
    shown: int = 0,
    most: int | None = None,
    frozen: Set[str] | None = frozenset(),
) -> Traced:
    """Captures a clone at several lengths and unifies the graphs.

    Args:
        every_pair: for the first length, see `without_selections`.
        needed: see `trace_symbolically`.
        shown: see `Traced`; that is not shown again.
        most: no longer sequence will be given to the model: what it does then does not matter.
        frozen: names of parameters that are never trained and have their values: what earlier
            calls have kept of these is what is computed of them, if the numbers are the same.
            None: they have no values here, and this was shown of the model as it is.

    Raises:
        PortError: forward cannot be traced at a plain length, its result depends on earlier
            calls, or the graphs differ in more than sizes and constants.
    """
    token_argument(model)
    fresh = _first(model, every_pair, needed, shown)
    second = _second(model, fresh)
    refuse_recurrence(fresh, second)  # before the search for the longest length: that runs loops
    asked_for = most if most is not None and most >= _FEWEST else None
    limit = _smaller(longest_of(model, fresh.length), asked_for)
    found = _lengths(model, limit)
    lengths, limit = found.samples, found.limit
    histories = histories_of(model, fresh, limit or UNBOUNDED, frozen)
    if () in histories and second is not None:
        histories[()].append(second)
    try:
        samples, unified, longest = _at_all(model, histories, found, limit, frozen)
        refuse_carried(samples)
        if len(histories) == 1:
            refuse_kept(model, fresh, samples, frozen)
    except PortError as error:
        raise PortError(writes_to_state(fresh) or error.reasons) from error
    if every_pair:
        questions, rows = asked_about_rows(model, fresh.length)
        require_every_batch(model, questions, rows, fresh.length)
    traced = _traced(unified, samples[0], lengths, longest)
    return replace(traced, doubtful=found.doubtful, walked=found.walked, unseen=found.unseen)


def _traced(unified: Unified, first: Sample, lengths: Sequence[int], longest: int | None) -> Traced:
    return Traced(
        graph=unified.graph,
        tokens=unified.tokens,
        batch=unified.batch,
        length=unified.length,
        shortest=2,
        limit=_smaller(longest, _bound(unified)),
        length_line=None,
        output=first.logits,
        way=f"torch.export at the lengths {', '.join(map(str, lengths))}, unified",
        unkept=first.unkept,
    )


def _at_all(
    model: nn.Module,
    histories: Mapping[tuple[int, ...], Sequence[Sample]],
    found: _Lengths,
    limit: int | None,
    frozen: Set[str] | None,
) -> tuple[list[Sample], Unified, int | None]:
    """The samples, and the graph that they have in common, after the first history that has one.

    Args:
        histories: with the samples that were taken after each.

    Raises:
        PortError: they have none after any, or another history gives other numbers somewhere.
    """
    tried: list[tuple[list[Sample], PortError]] = []
    for history, known in histories.items():
        taken = {s.length: s for s in known}
        samples = [taken.get(n) or take_sample(model, _batch(n), n, history) for n in found.samples]
        sizes = {(s.batch, s.length) for s in samples}
        others = [size for size in found.together if size not in sizes]
        samples += [take_sample(model, b, n, history) for b, n in others]
        for sample in samples:
            plain = plain_path(model, sample.batch, sample.length, sample.history)
            refuse_another_path(sample.paths, plain)
        try:
            unified, longest = _unified(model, samples, history, limit)
        except PortError as error:
            tried.append((samples, error))
            continue
        for before, why in () if frozen is None else tried:
            pairs = zip(before, samples, strict=True)
            if not all(give_the_same(pair, frozen) for pair in pairs):
                raise why
        return samples, unified, longest
    raise tried[-1][1]


def _unified(
    model: nn.Module, samples: list[Sample], history: tuple[int, ...], limit: int | None
) -> tuple[Unified, int | None]:
    """The samples as one graph, and the longest length that it holds for."""
    samples = _calls_alike(samples)
    try:
        return unify(samples), limit
    except NeedsTable as needed:
        longest = limit or UNBOUNDED
        if needed.axes > 1:
            longest = min(longest, UNBOUNDED)
        first, *others = samples  # the first gives the hints
        sizes = _batch(longest), longest
        whole = next((s for s in others if (s.batch, s.length) == sizes), None)
        whole = whole or take_sample(model, *sizes, history)
        if longest > UNBOUNDED and whole.largest > _MOST_BYTES:
            longest = UNBOUNDED
            whole = take_sample(model, _batch(longest), longest, history)
        *samples, whole = _calls_alike([first, *(s for s in others if s is not whole), whole])
        return unify(samples, whole), longest


def _calls_alike(samples: list[Sample]) -> list[Sample]:
    """Samples that call torch's attention in the same way, where that means the same."""
    return masks_at_every_length(groups_at_every_length(samples))


def _first(model: nn.Module, every_pair: bool, needed: int, shown: int) -> Sample:
    """A sample at the first usual length that forward takes.

    Raises:
        PortError: it takes none; what the first said.
    """
    errors = []
    for length in _LENGTHS[::3]:
        try:
            pairs = every_pair and length != shown
            return take_sample(model, _batch(length), length, every_pair=pairs)
        except PortError as error:
            errors.append(error)
            if length <= needed:
                break
    raise errors[0]


def _second(model: nn.Module, first: Sample) -> Sample | None:
    """A sample at another usual length and the same batch size, if forward takes one."""
    length = next(n for n in _LENGTHS if n not in (first.length, first.batch))
    try:
        return take_sample(model, first.batch, length)
    except PortError:  # beyond its limit, or as wrong as the first; what is taken later says so
        return None


def _batch(length: int) -> int:
    """Batch sizes that differ from the length, and from sample to sample."""
    first = length % len(_BATCHES)
    return next(b for b in _BATCHES[first:] + _BATCHES if b != length)


def _smaller(one: int | None, other: int | None) -> int | None:
    return min((n for n in (one, other) if n is not None), default=None)


# --- which lengths -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Lengths:
    """What is captured, and what only numbers can tell.

    Attributes:
        samples: the usual lengths, and both sides of every number that forward compares T with.
        together: B and T on both sides of what forward asks about the two of them.
        limit: the longest for which they say anything.
        doubtful, walked, unseen: see `Traced`.
    """

    samples: tuple[int, ...]
    together: tuple[tuple[int, int], ...]
    limit: int | None
    doubtful: tuple[int, ...]
    walked: Walked | None
    unseen: str


def _lengths(model: nn.Module, limit: int | None) -> _Lengths:
    allowed = [*[n for n in _LENGTHS if limit is None or n <= limit][:3], 2]
    if len(allowed) < 3:
        reason = Reason(
            ReasonCode.LENGTH_SPECIALISED, f"forward accepts sequences of at most {limit} tokens"
        )
        raise PortError([reason])
    longest = limit or UNBOUNDED
    others: tuple[int, ...] = ()
    heard: dict[tuple[int, int], Heard] = {}
    asked = one = ask(model, allowed[0], heard=heard)
    known, counted = set(one.sides), asked.counted
    if not counted:  # else forward may tell a symbol from a number
        plain = plain_path(model, 1, allowed[0])
        counted = plain is not None and plain.steps != one.path.steps
    pending = {n for n in _chased(asked, allowed[0]) if n <= longest}
    going = set(one.going)
    while pending and len(known) < _MOST_PATHS:
        hint = pending.pop()
        asked = ask(model, hint, 1, one.of, heard)
        counted |= asked.counted
        going |= asked.going
        pending |= {n for n in _chased(asked, hint) - known if n <= longest}
        known |= asked.sides
    beyond = [n for n in known if n > longest]
    if beyond and limit is None:
        limit = min(beyond) - 1
    doubtful: set[int] = set()
    walked: Walked | None = None
    if counted or pending or going:
        named = numbers_in(model, longest)
        walked = walk(model, allowed[0], longest, (*named, *sorted(going)))
        if walked is not None:
            others = walked.others
            if walked.longest < longest:
                limit = longest = walked.longest
        if walked is None or not walked.every:
            doubtful.update(n for n in named if n <= longest)
        limit = longest  # what it asks farther out nobody has seen
    sides = frozenset(n for n in known if n <= longest)
    if counted and len(sides) > _MOST_PATHS:  # a loop over the rows that asks at each
        rows = {n for n in sides if n <= allowed[0] + 1}
        doubtful, sides = doubtful | rows, sides - rows
    samples = dict.fromkeys([*allowed, *sorted({*sides, *others})])
    # The walk has one row: what it found may hold for one row alone.
    together = (*_together(model, allowed[0], one, longest), *((1, n) for n in others if n > 2))
    unseen = _unseen(walked) if counted or pending or going else ""
    return _Lengths(tuple(samples), together, limit, tuple(sorted(doubtful)), walked, unseen)


def _unseen(walked: Walked | None) -> str:
    if walked is not None and walked.every:
        return ""
    seen = f": {walked.in_words()}" if walked is not None else ""
    return f"forward takes the length as a plain number, and not every length was looked at{seen}"


def _chased(asked: Asked, hint: int) -> frozenset[int]:
    """Sides at which forward may ask something else.

    T compared with a number that was made of T itself has its sides next to every hint: they are
    captured, and what is asked there is left to the walk.
    """
    return asked.sides - set(range(hint - 1, hint + 2)) if asked.counted else asked.sides


def _together(
    model: nn.Module, first: int, one: Asked, longest: int
) -> tuple[tuple[int, int], ...]:
    """Where one row is asked something else than two: ``T > 100 * B``, ``B == 1 and T > 100``."""
    two = ask(model, first, 2, one.of)
    pairs = {
        (rows, n)
        for rows, asked, other in ((1, one, two), (2, two, one))
        for question in asked.of.keys() - other.of.keys()
        for n in asked.of[question]
    }
    return tuple(sorted((b, n) for b, n in pairs if 2 < n <= longest)[:_MOST_PATHS])


def _bound(unified: Unified) -> int | None:
    """The largest T that satisfies what torch had to know while the shapes were derived."""
    guards = [g.expr for g in unified.shapes.guards]
    comparisons = [g for g in guards if isinstance(g, sympy.Rel) and not isinstance(g, sympy.Ne)]
    return first_change(comparisons, unified.length, 2, None)
