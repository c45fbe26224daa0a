"""Arguments of forward besides the token ids: what each is, for sequences of every length.

    example_inputs=(ids [2, 37], tril of ones [37, 37], 0)
    forward(ids)  calls  forward(ids, ones(T, T).tril(), 0)

    example_inputs={"input_ids": ids}, for ``forward(**data)``
    forward(ids)  calls  forward(input_ids=ids)

A number is itself. A tensor is what its values show: one number, positions, a triangle, a table
cut to the length. Integers like the ids that show nothing (targets) must not reach the logits.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fxport.capture.adapt import adapted
from fxport.capture.location import forward_line
from fxport.capture.unread import unread
from fxport.errors import FxportError, PortError, Reason, ReasonCode
from fxport.report import Decision, Outcome

__all__ = ["ExampleInputs", "token_ids_alone", "unknown_arguments"]

ExampleInputs = Tensor | Sequence[Any] | Mapping[str, Any]


@dataclass(frozen=True)
class _Fixed:
    """An argument as a function of the token ids' shape.

    Attributes:
        words: for the report.
        make: token ids as the model takes them -> the argument.
    """

    words: str
    make: Callable[[Tensor], Any]


def token_ids_alone(
    model: nn.Module, example_inputs: ExampleInputs | None
) -> tuple[nn.Module, tuple[Decision, ...]]:
    """The model itself, or a copy that knows its other arguments; and how each was fixed.

    Args:
        example_inputs: one call of forward; without one, arguments that may be None are, and
            others without a default must not reach the logits.

    Raises:
        FxportError: the example has no token ids, or does not say what an argument is.
    """
    signature = inspect.signature(model.forward)
    if example_inputs is None:
        missing = _missing(signature)
        ids = next(iter(signature.parameters), "")
        if not missing and not _by_name_alone(signature, ids):
            return model, ()
        fixed = {p.name: _unknown(p) for p in missing}
    else:
        ids, given = _bound(signature, example_inputs)
        if not given.keys() - {ids} and not _by_name_alone(signature, ids):
            return model, ()
        tokens = given[ids]
        fixed = {n: _fixed(n, v, tokens) for n, v in given.items() if n != ids}

    def call(forward: Callable[..., Any], tokens: Tensor) -> Any:
        made = {name: f.make(tokens) for name, f in fixed.items()} | {ids: tokens}
        arguments = {name: made.pop(name) for name in signature.parameters if name in made}
        if made:
            arguments[_various(signature)] = made
        bound = inspect.BoundArguments(signature, arguments)  # type: ignore[arg-type]
        return forward(*bound.args, **bound.kwargs)

    line = forward_line(model)
    decisions = tuple(
        Decision("capture", Outcome.REWRITTEN, f"argument `{name}`", f.words, location=line)
        for name, f in fixed.items()
    )
    return adapted(model, call), decisions


def unknown_arguments(model: nn.Module, refused: PortError) -> PortError:
    """Says first which arguments nobody knows, where a trace without them failed."""
    signature = inspect.signature(model.forward)
    missing = [p.name for p in _missing(signature)]
    if not missing and list(signature.parameters) == [_various(signature)]:
        reason = Reason(
            ReasonCode.CAPTURE_FAILED,
            f"forward takes `**{_various(signature)}`: nobody knows the name of the token ids",
            forward_line(model),
            'show one call: fxport.port(model, example_inputs={"input_ids": ids, ...})',
        )
        return PortError([reason])
    codes = {reason.code for reason in refused.reasons}
    if not missing or codes != {ReasonCode.CAPTURE_FAILED}:
        return refused
    names = ", ".join(f"`{name}`" for name in missing)
    reason = Reason(
        ReasonCode.CAPTURE_FAILED,
        f"forward needs {names} besides the token ids",
        forward_line(model),
        "give defaults, or show one call: fxport.port(model, example_inputs=(ids, ...)) with "
        "int64 ids of several tokens; the report says how each other argument was fixed",
    )
    return PortError([reason, *refused.reasons])


def _missing(signature: inspect.Signature) -> list[inspect.Parameter]:
    """Arguments without a default after the first."""
    various = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    later = list(signature.parameters.values())[1:]
    return [p for p in later if p.default is p.empty and p.kind not in various]


def _various(signature: inspect.Signature) -> str:
    """What forward calls keywords of any name, as ``**data``."""
    kinds = {p.kind: p.name for p in signature.parameters.values()}
    return kinds.get(inspect.Parameter.VAR_KEYWORD, "")


def _by_name_alone(signature: inspect.Signature, name: str) -> bool:
    """Whether an argument cannot be given by its place."""
    found = signature.parameters.get(name)
    if found is None:
        return bool(_various(signature))
    return found.kind is found.KEYWORD_ONLY


def _unknown(parameter: inspect.Parameter) -> _Fixed:
    name = parameter.name
    if _may_be_none(parameter.annotation):
        return _Fixed("None, which its annotation allows", lambda ids: None)
    return _unread(name)


def _unread(name: str) -> _Fixed:
    return _Fixed("any value: the logits do not depend on it", lambda ids: unread(ids, name))


def _may_be_none(annotation: Any) -> bool:
    if isinstance(annotation, str):
        return "None" in annotation or annotation.startswith(("Optional[", "typing.Optional["))
    return type(None) in typing.get_args(annotation)


def _bound(
    signature: inspect.Signature, example_inputs: ExampleInputs
) -> tuple[str, dict[str, Any]]:
    """The name of the token ids, and the example's arguments by name."""
    try:
        if isinstance(example_inputs, Tensor):
            bound = signature.bind(example_inputs)
        elif isinstance(example_inputs, Mapping):
            bound = signature.bind(**example_inputs)
        else:
            bound = signature.bind(*example_inputs)
    except TypeError as error:
        raise FxportError(f"forward cannot be called with example_inputs: {error}") from error
    given = dict(bound.arguments)
    given.update(given.pop(_various(signature), {}))
    for name, value in given.items():
        if isinstance(value, Tensor) and _is_integer(value) and value.dim() in (1, 2):
            if (value.dim() == 2 and value.shape[0] == value.shape[1]) or value.shape[-1] == 1:
                raise FxportError(
                    "give example token ids whose batch and length differ, and longer than 1"
                )
            return name, given
    raise FxportError("example_inputs holds no token ids: an integer tensor [B, T] or [T]")


def _is_integer(value: Tensor) -> bool:
    return not value.is_floating_point() and not value.is_complex() and value.dtype != torch.bool


# --- what one argument is --------------------------------------------------------------------


def _fixed(name: str, value: Any, ids: Tensor) -> _Fixed:
    """Of a number, a tensor, or a container of them."""
    said: list[str] = []

    def leaf(held: Any) -> _Fixed:
        found = _tensor(name, held, ids) if isinstance(held, Tensor) else _plain(name, held, ids)
        said.append(found.words)
        return found

    made = tree_map(leaf, value)
    words = ", ".join(dict.fromkeys(said)) or repr(value)
    return _Fixed(words, lambda tokens: tree_map(lambda f: f.make(tokens), made))


def _plain(name: str, value: Any, ids: Tensor) -> _Fixed:
    if type(value) is int and value > 1 and value == ids.shape[-1]:
        raise FxportError(
            f"`{name}` is {value}, and so is the length of the example token ids: give ids of "
            "another length if it is a number, or give it a default that is read off the ids"
        )
    return _Fixed(f"always {value!r}", lambda tokens: value)


def _tensor(name: str, value: Tensor, ids: Tensor) -> _Fixed:
    axes = _axes(value, ids)
    for recipe in (_one_number, _positions, _triangle):
        found = recipe(value, ids, axes)
        if found is not None:
            return found
    if _is_integer(value) and value.shape == ids.shape:
        return _unread(name)
    growing = [dim for dim, axis in enumerate(axes) if axis is not None]
    if not growing:
        return _Fixed(f"always this tensor {list(value.shape)}", lambda tokens: value.clone())
    if len(growing) == 1 and axes[growing[0]] == ids.dim() - 1:
        dim = growing[0]
        words = f"the first T rows of this table of {value.shape[dim]} (no longer sequences)"
        return _Fixed(words, lambda tokens: value.narrow(dim, 0, tokens.shape[-1]).clone())
    raise FxportError(
        f"what `{name}` is for other sequences does not show: a tensor {list(value.shape)} for "
        f"token ids {list(ids.shape)} may hold one number, positions, a triangle, or a row for "
        "each position"
    )


def _axes(value: Tensor, ids: Tensor) -> list[int | None]:
    """For each dimension, which of the ids' it is as long as."""
    if value.shape == ids.shape:
        return list(range(ids.dim()))
    sizes = {size: axis for axis, size in enumerate(ids.shape) if size > 1}
    return [sizes.get(size) for size in value.shape]


def _shape(value: Tensor, axes: list[int | None], tokens: Tensor) -> list[int]:
    return [
        size if axis is None else tokens.shape[axis]
        for size, axis in zip(value.shape, axes, strict=True)
    ]


def _one_number(value: Tensor, ids: Tensor, axes: list[int | None]) -> _Fixed | None:
    if not value.numel() or not bool((value == value.flatten()[0]).all()):
        return None
    number = value.flatten()[0].item()

    def make(tokens: Tensor) -> Tensor:
        shape = _shape(value, axes, tokens)
        return torch.full(shape, number, dtype=value.dtype, device=tokens.device)

    return _Fixed(f"{number!r} everywhere", make)


def _positions(value: Tensor, ids: Tensor, axes: list[int | None]) -> _Fixed | None:
    """0, 1, 2, ... along the last dimension, from any first number."""
    if not value.dim() or axes[-1] != ids.dim() - 1 or value.dtype == torch.bool:
        return None
    first = value.flatten()[0].item()
    counted = torch.arange(value.shape[-1], device=value.device) + first
    if not bool((value == counted).all()):
        return None

    def make(tokens: Tensor) -> Tensor:
        counted = torch.arange(tokens.shape[-1], dtype=value.dtype, device=tokens.device)
        counted = counted + first if first else counted
        return counted.expand(_shape(value, axes, tokens))

    return _Fixed(f"the positions {first}, {first + 1}, ...", make)


def _triangle(value: Tensor, ids: Tensor, axes: list[int | None]) -> _Fixed | None:
    """``[.., T, T]``: one number up to the diagonal, another one after it."""
    if value.dim() < 2 or axes[-1] != ids.dim() - 1 or axes[-2] != ids.dim() - 1:
        return None
    seen = torch.ones(value.shape[-2:], dtype=torch.bool, device=value.device).tril()
    inner, outer = value[..., 0, 0].flatten()[0], value[..., 0, -1].flatten()[0]
    if not torch.equal(torch.where(seen, inner, outer).expand_as(value), value):
        return None
    numbers = inner.item(), outer.item()

    def make(tokens: Tensor) -> Tensor:
        shape = _shape(value, axes, tokens)
        square = torch.ones(shape[-2:], dtype=torch.bool, device=tokens.device).tril()
        seen, unseen = (torch.tensor(n, dtype=value.dtype, device=tokens.device) for n in numbers)
        return torch.where(square, seen, unseen).expand(shape)

    return _Fixed(f"a triangle: {numbers[0]!r} up to the diagonal, else {numbers[1]!r}", make)
