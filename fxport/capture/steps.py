"""The steps of forward at one length, and whether another length takes the same.

T = 37: view(x, [1, 37, 64])    T = 96: view(x, [1, 96, 64])    T = 50: view(x, [1, 50, 64])  same
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Constant", "Of", "Other", "Reference", "Step"]


@dataclass(frozen=True, eq=False)
class Step:
    """One operation, and everything that it was given, flat.

    Attributes:
        given: numbers, types, ...; `Constant`, or `Of` for what depends on tokens or parameters.
    """

    target: Any
    given: tuple[Any, ...]


@dataclass(frozen=True)
class Of:
    """A value that an earlier step made, or one that the model holds."""

    step: int


@dataclass(frozen=True, eq=False)
class Constant:
    """What depends on neither tokens nor parameters.

    Attributes:
        value: None where no memory was left to keep it.
        version: of its memory when it was used.
        made: how it was made; None when the model held it, or it was written to afterwards.
    """

    value: torch.Tensor | None
    version: int
    made: Step | None


class Other(Exception):
    """Forward takes another path."""


class Reference:
    """The path of one usual length, and of the longest where that is the same.

    Args:
        exact: every number must be the one of the usual length, too.
    """

    def __init__(
        self,
        low: int,
        lows: list[Step],
        high: int = 0,
        highs: list[Step] | None = None,
        *,
        exact: bool = False,
    ) -> None:
        self.exact = exact
        self.low, self.high = low, high
        self.lows, self.highs = lows, highs

    def compare(self, length: int, index: int, step: Step) -> None:
        """
        Raises:
            Other: this step is another one.
        """
        if index >= len(self.lows):
            raise Other
        steps = (self.lows[index], self.highs[index] if self.highs else None)
        if not self._equal(length, (*steps, step), {}):
            raise Other

    def _equal(self, length: int, steps: tuple[Any, Any, Any], known: dict[Any, bool]) -> bool:
        low, high, step = steps
        key = (id(low), id(high), id(step))
        if key not in known:
            known[key] = False  # no step is made of itself
            highs = high.given if high is not None else (None,) * len(low.given)
            known[key] = (
                low.target == step.target
                and len(low.given) == len(step.given) == len(highs)
                and all(
                    self._leaf(length, leaves, known)
                    for leaves in zip(low.given, highs, step.given, strict=True)
                )
            )
        return known[key]

    def _leaf(self, length: int, leaves: tuple[Any, Any, Any], known: dict[Any, bool]) -> bool:
        low, high, value = leaves
        if type(low) is not type(value):
            return False
        if isinstance(value, Constant):
            made = (low.made, high.made if high is not None else None, value.made)
            alike = low.made and value.made and (high is None or high.made)
            if alike and self._equal(length, made, known):
                return True
            return _begins(value, low) and (high is None or _begins(high, value))
        if isinstance(value, torch.Tensor):
            return value is low
        if isinstance(value, int) and not isinstance(value, bool):
            if high is None:
                return not self.exact or value == low
            return (value - low) * (self.high - self.low) == (high - low) * (length - self.low)
        return bool(value == low) or value != value


def _begins(longer: Constant, shorter: Constant) -> bool:
    """Or the other way round, along any axis."""
    one, other = longer.value, shorter.value
    if one is None or other is None or one.dim() != other.dim() or one.dtype != other.dtype:
        return False
    if one is other:
        return True
    if (one._version, other._version) != (longer.version, shorter.version):
        return False
    for axis in range(one.dim()):
        size = min(one.shape[axis], other.shape[axis])
        one, other = one.narrow(axis, 0, size), other.narrow(axis, 0, size)
    if one.is_floating_point() or one.is_complex():
        return torch.allclose(one, other, rtol=0.0, atol=0.0, equal_nan=True)
    return torch.equal(one, other)
