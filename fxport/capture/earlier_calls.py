"""Which earlier calls a model remembers, and that they make no difference.

self.cos = table(T) if T > len(self.cos) ...    the same after no call, a longest one, any two
self.kept[:T] = angles of a frozen parameter    a constant in one graph, computed in another
self.calls += 1                                 the same at the numbers that the code names
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence, Set
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fxport.capture.clone import carried
from fxport.capture.questions import by_shapes, numbers_in
from fxport.capture.sample import Sample, device_of, take_sample, with_values
from fxport.capture.state import State
from fxport.capture.unify import NeedsTable, unify
from fxport.capture.written import writes_to_state
from fxport.errors import PortError

__all__ = ["give_the_same", "histories_of", "refuse_carried", "refuse_kept"]

_SHORTEST = 2


def histories_of(
    model: nn.Module, fresh: Sample, longest: int, frozen: Set[str] | None
) -> dict[tuple[int, ...], list[Sample]]:
    """Earlier calls to make before each sample, as they are to be tried: none, or a longest one.

    A model that keeps nothing between calls has no history. One that does must give the same
    after any: none, a longer call, a shorter and a longer one. What was kept of frozen parameters
    is a constant and hides them. So where calls without earlier ones have no graph in common, a
    longest one makes it anew at every length.

    Returns:
        Histories, and the samples that were taken after each.

    Raises:
        PortError: the result depends on earlier calls.
    """
    if not fresh.changed and (frozen == set() or not _changes(model, longest)):
        return {(): [fresh]}
    if fresh.changed:
        _require_no_counting(model, fresh)
    if frozen is None:
        return {(): [fresh], (longest,): []}
    histories = ((longest,), (2, longest))
    after = [take_sample(model, fresh.batch, fresh.length, h) for h in histories]
    if fresh.changed and _have_one_graph([fresh, *after]):
        # what earlier calls have kept may serve the shortest alone
        short = [take_sample(model, fresh.batch, _SHORTEST, h) for h in ((), histories[0])]
        if _have_one_graph(short):
            return {histories[0]: [after[0], short[1]]}
    if give_the_same([fresh, *after], frozen):
        return {(): [fresh], histories[0]: after[:1]}
    if fresh.changed:
        raise PortError(writes_to_state(fresh) or fresh.changed)
    return {(): [fresh]}


def refuse_kept(
    model: nn.Module, fresh: Sample, samples: Sequence[Sample], frozen: Set[str] | None
) -> None:
    """What the first length leaves alone, and others keep, must make no difference.

    if T > 64: self.grown = True                    a longer call, then the first length again

    Raises:
        PortError: after calls that keep something, that or the shortest gives something else.
    """
    keeping = [] if fresh.changed else sorted((s for s in samples if s.changed), key=_length)
    if not keeping or frozen is None:
        return
    up = tuple(dict.fromkeys(s.length for s in keeping))
    for one, histories in ((fresh, {up, up[::-1]}), (min(samples, key=_length), {up})):
        again = [take_sample(model, one.batch, one.length, history) for history in histories]
        if not give_the_same([one, *again], frozen):
            raise PortError(writes_to_state(keeping[-1]) or keeping[-1].changed)


def _length(sample: Sample) -> int:
    return sample.length


def refuse_carried(samples: Sequence[Sample]) -> None:
    """What every call sets anew carries nothing from call to call, and needs no history.

    Raises:
        PortError: a call of another length reads what one has set, and may find it there.
    """
    read = {key for sample in samples for key in sample.read}
    left = {key: reason for sample in samples for key, reason in sample.overwritten.items()}
    if reasons := carried(left, read):
        raise PortError(reasons)


_FAR = 10**6 + 3  # calls
_MOST = 8


def _require_no_counting(model: nn.Module, fresh: Sample) -> None:
    """Numbers that every call changes count calls: many earlier ones must make no difference.

    Raises:
        PortError: they do, or forward cannot be run by shapes.
    """
    kept = State(model)
    counters = _counters(model, fresh.length)
    if counters is None:
        raise PortError(fresh.changed)
    if not counters:
        return
    for number in [_FAR, *(n - 1 for n in numbers_in(model, _FAR))][:_MOST]:
        for place in counters:
            kept.put(place, number)
        try:
            same = _have_one_graph([fresh, take_sample(model, fresh.batch, fresh.length)])
        except PortError:
            same = False
        finally:
            kept.restore()
        if not same:
            raise PortError(fresh.changed)


def _counters(model: nn.Module, length: int) -> list[tuple[int, Any]] | None:
    """Where the numbers lie that a second call of the same length changes again, by shapes.

    None where it fails.
    """
    ids = torch.zeros(1, length, dtype=torch.long, device=device_of(model))
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv(), static_shapes=True)
    kept = State(model)
    found = []
    with by_shapes(model, mode), contextlib.suppress(Exception):
        for _ in range(2):
            model(mode.from_tensor(ids))
            found.append(kept.now().numbers())
    if len(found) < 2:
        return None
    before = kept.numbers()
    return [p for p in before if len({n[p] for n in (before, *found) if p in n}) == 3]


def give_the_same(samples: Sequence[Sample], frozen: Set[str] | None) -> bool:
    """Of samples of one size: whether what they keep of frozen parameters has the same numbers."""
    return _have_one_graph([with_values(s, frozen or frozenset()) for s in samples])


def _have_one_graph(samples: Sequence[Sample]) -> bool:
    try:
        unify(samples)
    except (PortError, NeedsTable):
        return False
    return True


def _changes(model: nn.Module, length: int) -> bool:
    """Whether a call of this length leaves the model another than it was, by shapes alone."""
    ids = torch.zeros(1, length, dtype=torch.long, device=device_of(model))
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv(), static_shapes=True)
    with by_shapes(model, mode):
        state = State(model)
        with contextlib.suppress(Exception):  # a trace says what is wrong, if anything is
            model(mode.from_tensor(ids))
        return bool(state.changes())
