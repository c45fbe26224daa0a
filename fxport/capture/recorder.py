"""Runs one forward by shapes alone, or with numbers, and notes its steps.

    mask = ones(37, 37).tril()              constants are computed
    x = embedding(weight, ids)              of tokens and parameters: a shape, and the step's number
    self.kept[:37] = mask[0]                what the model held before is put back

With numbers only where shapes do not do: an operation without a shape function, a question about
a value.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from fxport.capture.memos import files_around
from fxport.capture.state import State
from fxport.capture.steps import Constant, Of, Step

__all__ = [
    "BeyondTable",
    "Recorder",
    "RecorderOfNumbers",
    "Somewhere",
    "Written",
    "WrittenAnywhere",
]

aten = torch.ops.aten

# So many numbers of a constant ([T, T] masks) take about as long as an operation on shapes.
_NUMBERS = 2**17


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


class Somewhere(TorchFunctionMode):
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


class BeyondTable(IndexError):
    """A position that no token says is looked up beyond the end of a table of parameters."""


class Written:
    """What lay in the model's own memory before constants were written there."""

    def __init__(self, model: nn.Module) -> None:
        held = [*State(model).values(), *(v for f in files_around(model) for v in vars(f).values())]
        tensors = [t for t in held if isinstance(t, torch.Tensor) and not t.is_meta]
        self._own = {t.untyped_storage()._cdata for t in tensors}
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def _holds(self, memory: torch.UntypedStorage) -> bool:
        return memory._cdata in self._own

    def note(self, value: torch.Tensor) -> None:
        """Before an operation that may write to it."""
        memory = value.untyped_storage()
        if self._holds(memory) and memory._cdata not in self._before:
            self._before[memory._cdata] = memory, memory.clone()

    def close(self) -> None:
        """Puts it back; no tensor's version counts that."""
        for memory, before in self._before.values():
            memory.copy_(before)


class Recorder(TorchDispatchMode):
    """Runs constants, and of everything else the shapes."""

    def __init__(self, written: Written, seen: Callable[[int, Step], None]) -> None:
        super().__init__()
        self.numbers = written
        self.seen = seen
        self.steps = self.cost = 0
        self.made: Any = WeakIdKeyDictionary()  # constant -> how, and the version it then had
        self.changes: Counter[int] = Counter()  # of memory whose tensors have no versions
        self.results: dict[Any, Any] = {}
        self.written: dict[int, tuple[Any, Of]] = {}  # memory of the model that holds tokens
        self.rows: set[int] = set()  # of the tables of parameters that constants look up

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
                        if value.is_inference():
                            self.changes[value.untyped_storage()._cdata] += 1
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
        now = self._version(value)
        made, version = self.made.get(value, (None, now))
        made = made if version == now else None
        if value.is_inference():  # nobody would see that it is written to afterwards
            self.cost += value.numel() // _NUMBERS
            with torch.inference_mode(False):
                value = value.clone()
            return Constant(value, value._version, made)
        return Constant(value, now, made)

    def _version(self, value: torch.Tensor) -> int:
        if not value.is_inference():
            return value._version
        return self.changes.get(value.untyped_storage()._cdata, 0)

    def _constant(self, step: Step, result: Any) -> Any:
        for value in _flat(result if isinstance(result, tuple | list) else (result,)):
            if isinstance(value, torch.Tensor):
                self.cost += value.numel() // _NUMBERS
                if value not in self.made:
                    self.made[value] = step, self._version_of(value, step)
        return result

    def _version_of(self, result: torch.Tensor, step: Step) -> int:
        """A view gets the version of what it views only after this operation."""
        memory = result.untyped_storage()._cdata
        held = [one for one in step.given if isinstance(one, Constant) and one.value is not None]
        viewed = (c.version for c in held if c.value.untyped_storage()._cdata == memory)  # type: ignore[union-attr]
        return next(viewed, self._version(result))

    def _shapes(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if torch.Tag.inplace_view in func.tags:
            raise NotImplementedError(f"{func} changes a shape in place")
        self._check_range(func, args)
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

    def _check_range(self, func: Any, args: Any) -> None:
        """Torch would find a position beyond a table of parameters only with numbers."""
        if func is not aten.embedding.default or _is_shape(args[1]) or not args[1].numel():
            return
        rows = args[0].shape[0]
        self.rows.add(rows)
        if int(args[1].max()) >= rows:
            raise BeyondTable


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


class WrittenAnywhere(Written):
    """What lay in any memory that a run did not make itself."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._made: set[int] = set()

    def make(self, result: torch.Tensor, given: Sequence[Any]) -> None:
        """After an operation: memory that nothing it was given lies in is the run's own."""
        memory = result.untyped_storage()._cdata
        if all(v.untyped_storage()._cdata != memory for v in given if isinstance(v, torch.Tensor)):
            self._made.add(memory)

    def _holds(self, memory: torch.UntypedStorage) -> bool:
        return memory._cdata not in self._made


class RecorderOfNumbers(Recorder):
    """Runs everything."""

    numbers: WrittenAnywhere

    def __init__(self, written: WrittenAnywhere, seen: Callable[[int, Step], None]) -> None:
        super().__init__(written, seen)
        self.of: Any = WeakIdKeyDictionary()

    def tokens_at(self, length: int, device: torch.device) -> torch.Tensor:
        """One row of the token that every vocabulary has."""
        ids = torch.zeros(1, length, dtype=torch.long, device=device)
        self.of[ids] = Of(-1)
        return ids

    def _of(self, value: torch.Tensor) -> Of | None:
        found: Of | None = self.of.get(value)
        return super()._of(value) if found is None else found

    def _constant(self, step: Step, result: Any) -> Any:
        self._made(result, step.given)
        return super()._constant(step, result)

    def _shapes(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        here = Of(self.steps - 1)
        flat = list(_flat((args, *kwargs.values())))
        if func._schema.is_mutable:
            for value in flat:
                if isinstance(value, torch.Tensor):
                    self.numbers.note(value)
                    memory = value.untyped_storage()
                    self.written[memory._cdata] = memory, here
        result = func(*args, **kwargs)
        self._made(result, flat)
        for value in _flat((result,)):
            if isinstance(value, torch.Tensor):
                self.of[value] = here
        return result

    def _made(self, result: Any, given: Sequence[Any]) -> None:
        for value in _flat((result,)):
            if isinstance(value, torch.Tensor):
                self.numbers.make(value, given)
