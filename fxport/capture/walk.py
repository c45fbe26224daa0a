"""Whether forward takes the same steps at every length, where the length is a plain number.

Nobody sees what code asks about ``int(T)``, so every length is walked, by shapes alone:

T = 37:  embedding(w, ids)  mul(x, 1.0)  view(x, [1, 37, 64])  masked_fill(s, mask [37, 37], -inf)
T = 90:  embedding(w, ids)  mul(x, 2.0)  ...                        90 is another path: look there

What depends on tokens or parameters has a shape only. Everything else (masks, position tables)
has its values, and must be made in the same way or be the beginning of what longer sequences use.
Where that takes more than `_MOST_STEPS`, a grid of lengths is walked, and what the code names.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from fxport.capture.memos import files_around
from fxport.capture.paths import Path, followed_calls, joined
from fxport.capture.questions import forward_only
from fxport.capture.sample import device_of
from fxport.capture.selected import EverySelected
from fxport.capture.state import State
from fxport.capture.steps import Constant, Of, Reference, Step

__all__ = ["Walked", "Written", "plain_path", "steps_of", "walk"]

aten = torch.ops.aten

# Operations in all, those on constants included; beyond it not every length is walked.
_MOST_STEPS = 40_000
_FEWEST = 16
# So many numbers of a constant ([T, T] masks) take about as long as an operation on shapes.
_NUMBERS = 2**17
# Changes of the path that are handed on: the graphs of their sides decide.
_FIRST = 2
# Bytes of constants that are kept for comparison.
_KEPT = 2**28


@dataclass(frozen=True)
class Walked:
    """What was seen.

    Attributes:
        others: lengths at which forward takes another path than at the usual ones, and their
            neighbours that do not; only the first few, and the longest.
        count: how many lengths were walked and are no others.
        longest: the longest that forward takes.
    """

    others: tuple[int, ...]
    count: int
    longest: int

    @property
    def every(self) -> bool:
        """Whether all lengths were walked, and none is another."""
        return self.count == self.longest - 1

    def in_words(self) -> str:
        if self.others:
            found = ", ".join(map(str, self.others))
            return f"another path at some of the lengths {found}, and the same graph"
        which = "every length" if self.every else f"{self.count} of the lengths"
        return f"forward takes the same steps at {which} from 2 to {self.longest}"


def walk(model: nn.Module, usual: int, longest: int, named: Sequence[int]) -> Walked | None:
    """Walks the lengths from 2 to `longest`.

    Args:
        usual: a length that forward takes.
        named: lengths that the model's code names.

    Returns:
        None when forward cannot be run on shapes that have no numbers behind them.
    """
    try:
        low, _ = _run(model, usual)
    except Exception:  # it looks at values, or uses an operation that has no shape function
        return None
    reference = Reference(usual, low)
    longest = _last(lambda n: _runs(model, n), usual, longest)
    if longest == usual:
        return None
    if not _same(model, longest, reference):
        last = _last(lambda n: _same(model, n, reference), usual, longest)
        return Walked((last, last + 1, longest), 0, longest)
    high, cost = _run(model, longest)
    reference = Reference(usual, low, longest, high)
    lengths = _which(longest, max(_MOST_STEPS // cost, _FEWEST), named)
    others: list[int] = []
    before = usual
    for n in lengths:
        if _same(model, n, reference):
            before = n
            continue
        others += [_last(lambda k: _same(model, k, reference), before, n), n]
        if len(others) >= 2 * _FIRST:
            break
    if others:
        return Walked(tuple(sorted({*others, longest})), 0, longest)
    return Walked((), len(lengths), longest)


def _which(longest: int, most: int, named: Sequence[int]) -> list[int]:
    if longest - 1 <= most:
        return list(range(2, longest + 1))
    powers = [2**n for n in range(longest.bit_length())]
    near = {n + side for n in (*named, *powers) for side in (-1, 0, 1)}
    step = -(-longest // most)
    return sorted(n for n in {*range(2, longest, step), *near} if 2 <= n <= longest)


def _last(holds: Callable[[int], bool], low: int, high: int) -> int:
    """The last length before one where it does not hold, by bisection; it holds at `low`."""
    if holds(high):
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


# --- one length ------------------------------------------------------------------------------


def _shape(like: torch.Tensor, of: Of) -> torch.Tensor:
    """Stands for what depends on tokens or parameters: a plain tensor without numbers."""
    made = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device="meta")
    made.fxport_of = of  # type: ignore[attr-defined]
    return made


def _is_shape(value: Any) -> bool:
    return hasattr(value, "fxport_of")


_DEVICE = torch.Tensor.device.__get__  # type: ignore[attr-defined]
_KINDS = {
    torch.Tensor.is_meta.__get__: "meta",  # type: ignore[attr-defined]
    torch.Tensor.is_cpu.__get__: "cpu",  # type: ignore[attr-defined]
    torch.Tensor.is_cuda.__get__: "cuda",  # type: ignore[attr-defined]
}


class _Somewhere(TorchFunctionMode):
    """Shapes say that they are where the model's parameters are."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if args and (func == _DEVICE or func in _KINDS) and _is_shape(args[0]):
            return self.device if func == _DEVICE else self.device.type == _KINDS[func]
        return func(*args, **(kwargs or {}))


class Written:
    """What lay in the model's own memory before constants were written there."""

    def __init__(self, model: nn.Module) -> None:
        held = [*State(model).values(), *(v for f in files_around(model) for v in vars(f).values())]
        tensors = [t for t in held if isinstance(t, torch.Tensor) and not t.is_meta]
        self._own = {t.untyped_storage()._cdata for t in tensors}
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def note(self, value: torch.Tensor) -> None:
        """Before an operation that may write to it."""
        memory = value.untyped_storage()
        if memory._cdata in self._own and memory._cdata not in self._before:
            self._before[memory._cdata] = memory, memory.clone()

    def close(self) -> None:
        """Puts it back; no tensor's version counts that."""
        for memory, before in self._before.values():
            memory.copy_(before)


class _Recorder(TorchDispatchMode):
    """Runs constants, and of everything else the shapes."""

    def __init__(self, written: Written, seen: Callable[[int, Step], None]) -> None:
        super().__init__()
        self.numbers = written
        self.seen = seen
        self.steps = self.cost = 0
        self.made: Any = WeakIdKeyDictionary()  # constant -> how, and the version it then had
        self.results: dict[Any, Any] = {}
        self.written: dict[int, tuple[Any, Of]] = {}  # memory of the model that holds tokens

    def tokens(self, batch: int, length: int) -> torch.Tensor:
        return _shape(torch.empty(batch, length, dtype=torch.long, device="meta"), Of(-1))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.cost += 1
        flat = list(_flat((*args, *(v for _, v in sorted((kwargs or {}).items())))))
        shapeless = any(isinstance(v, torch.Tensor) and self._of(v) is not None for v in flat)
        given = tuple(self._given(v) if isinstance(v, torch.Tensor) else v for v in flat)
        step = Step((func, tuple(sorted(kwargs or {}))), given)
        if not shapeless:
            if func._schema.is_mutable:
                for value in flat:
                    if isinstance(value, torch.Tensor):
                        self.numbers.note(value)
            return self._constant(step, func(*args, **(kwargs or {})))
        self.seen(self.steps, step)
        self.steps += 1
        return self._shapes(func, args, kwargs or {})

    def _of(self, value: torch.Tensor) -> Of | None:
        if _is_shape(value):
            found: Of = value.fxport_of  # type: ignore[attr-defined]
            return found
        if isinstance(value, nn.Parameter):
            return Of(-2)
        if self.written:
            return self.written.get(value.untyped_storage()._cdata, (None, None))[1]
        return None

    def numberless(self, value: torch.Tensor) -> bool:
        return not isinstance(value, nn.Parameter) and self._of(value) is not None

    def _given(self, value: torch.Tensor) -> Any:
        if isinstance(value, nn.Parameter):
            return value
        of = self._of(value)
        if of is not None:
            return of
        made, version = self.made.get(value, (None, value._version))
        return Constant(value, value._version, made if version == value._version else None)

    def _constant(self, step: Step, result: Any) -> Any:
        for value in _flat(result if isinstance(result, tuple | list) else (result,)):
            if isinstance(value, torch.Tensor):
                self.cost += value.numel() // _NUMBERS
                if value not in self.made:
                    self.made[value] = step, value._version
        return result

    def _shapes(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if torch.Tag.inplace_view in func.tags:
            raise NotImplementedError(f"{func} changes a shape in place")
        _check_range(func, args)
        here = Of(self.steps - 1)
        if func._schema.is_mutable and not _is_shape(args[0]):
            memory = args[0].untyped_storage()
            self.written[memory._cdata] = memory, here
        key = (func, tuple(map(_size, _flat((args, *sorted(kwargs.items()))))))
        if key not in self.results:  # the layers of a model are alike
            meta = torch.device("meta")
            kwargs = {k: meta if isinstance(v, torch.device) else v for k, v in kwargs.items()}
            self.results[key] = func(*_mapped(args, _emptied), **_mapped(kwargs, _emptied))
        if func._schema.is_mutable:
            return args[0]
        return _mapped(self.results[key], lambda t: _shape(t, here))


def _check_range(func: Any, args: Any) -> None:
    """Torch would find a position beyond a table of parameters only with numbers."""
    if func is not aten.embedding.default or _is_shape(args[1]) or not args[1].numel():
        return
    if int(args[1].max()) >= args[0].shape[0]:
        raise IndexError("beyond the table")


def _size(value: Any) -> Any:
    """All that a shape function sees of an argument."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.stride(), value.dtype
    return type(value), value


def _emptied(value: torch.Tensor) -> torch.Tensor:
    if _is_shape(value):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def _mapped(value: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, list | tuple):
        return type(value)([_mapped(v, function) for v in value])
    if isinstance(value, dict):
        return {k: _mapped(v, function) for k, v in value.items()}
    return value


def _flat(values: Sequence[Any]) -> Iterator[Any]:
    """All leaves; a list begins with its own type, and ends."""
    for value in values:
        if isinstance(value, list | tuple):
            yield list
            yield from _flat(value)
            yield None
        else:
            yield value


def _run(
    model: nn.Module, length: int, seen: Callable[[int, Step], None] | None = None
) -> tuple[list[Step], int]:
    """See `steps_of`; nothing is left on the model."""
    with forward_only(model):
        return steps_of(model, length, seen)


def steps_of(
    model: nn.Module,
    length: int,
    seen: Callable[[int, Step], None] | None = None,
    written: Written | None = None,
) -> tuple[list[Step], int]:
    """The steps, unless `seen` takes them, and what all operations cost.

    Args:
        written: takes what the model's buffers held, which is put back here otherwise.

    Raises:
        Exception: forward does not take this length, or cannot be run on shapes.
    """
    steps: list[Step] = []
    kept = [0]

    def keep(_: int, step: Step) -> None:
        steps.append(Step(step.target, tuple(_within(v, kept) for v in step.given)))

    numbers = written or Written(model)
    recorder = _Recorder(numbers, seen or keep)
    try:
        with recorder, _Somewhere(device_of(model)), EverySelected(recorder.numberless):
            model(recorder.tokens(1, length))
    finally:
        if written is None:
            numbers.close()
    if seen is not None:
        seen(recorder.steps, _END)
    return [*steps, _END], recorder.cost


def plain_path(
    model: nn.Module, batch: int, length: int, history: Sequence[int] = ()
) -> Path | None:
    """What the user's code does in a call with plain sizes and tensors, after earlier calls.

    Returns:
        None where that is not known: it cannot be run on shapes, or asks about the tokens.
    """
    written = Written(model)
    recorder = _Recorder(written, lambda *_: None)
    selected = EverySelected(recorder.numberless)
    ids = [recorder.tokens(batch, n) for n in (*history, length)]
    with forward_only(model), contextlib.closing(written), contextlib.suppress(Exception):
        paths: list[Path] = []
        with recorder, _Somewhere(device_of(model)), selected, followed_calls(model, paths):
            for given in ids:
                model(given)
        return None if selected.answered else joined(paths)
    return None


_END = Step("the end", ())


def _within(value: Any, kept: list[int]) -> Any:
    """A constant without its value, when there are too many."""
    if isinstance(value, Constant) and value.value is not None:
        kept[0] += value.value.nbytes
        if kept[0] > _KEPT:
            return Constant(None, value.version, value.made)
    return value


def _runs(model: nn.Module, length: int) -> bool:
    try:
        _run(model, length, lambda *_: None)
    except Exception:  # beyond its limit
        return False
    return True


def _same(model: nn.Module, length: int, reference: Reference) -> bool:
    try:
        _run(model, length, lambda i, step: reference.compare(length, i, step))
    except Exception:  # `Other`, or it fails where others do not
        return False
    return True
