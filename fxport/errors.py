"""Typed reasons: why something was refused, or left as it was, and what the user can do."""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = [
    "FxportError",
    "FxportWarning",
    "Location",
    "PortError",
    "Reason",
    "ReasonCode",
    "SavedPortError",
]


class ReasonCode(enum.StrEnum):
    """What stands in the way. Programs branch on this; people read `Reason.message`."""

    # capture
    CAPTURE_FAILED = "capture-failed"  # tracing raised: data-dependent control flow, unknown call
    LENGTH_SPECIALISED = "length-specialised"  # the code takes another path for some lengths
    MUTATED_STATE = "mutated-state"  # forward changes an attribute that its result depends on
    NO_LOGITS = "no-logits"  # no output of shape [B, T, V] found
    NO_VOCABULARY = "no-vocabulary"  # token ids do not feed an embedding table
    UNSUPPORTED_OP = "unsupported-op"  # no rule for this op
    GRADIENT_DIFFERS = "gradient-differs"  # a graph of operations would be trained otherwise
    # attention
    WEIGHTS_USED_ELSEWHERE = "attention-weights-used-elsewhere"
    SOFTMAX_AXIS = "softmax-over-another-axis"
    NOT_ATTENTION = "softmax-is-not-attention"  # e.g. a router; says what it is
    MASK_NOT_PROVEN = "mask-not-proven"
    MASK_DATA_DEPENDENT = "mask-depends-on-data"
    EMPTY_ROW = "fully-masked-row"
    ORDER_OF_OPS = "order-of-operations"  # e.g. cap after mask
    MUTATED_IN_PLACE = "changed-in-place"
    UNSUPPORTED_FEATURE = "unsupported-feature"  # meaning known, the target cannot express it
    EVERY_TOKEN = "runs-for-every-token"  # work on selected tokens is done for all of them
    EVERY_STEP = "runs-at-every-step"  # what hangs on weights alone is made again and again
    # serving
    NOT_CAUSAL = "not-causal"
    MIXES_TOKENS = "mixes-tokens"
    DEPENDS_ON_LENGTH = "depends-on-length"
    DEPENDS_ON_BATCH = "depends-on-batch"
    POSITION_UNKNOWN = "position-unknown"
    SELF_CHECK = "self-check-failed"  # the emitted graph differs numerically from the original


@dataclass(frozen=True)
class Location:
    """A line of the user's code. `function` and `source` may be empty."""

    file: str
    line: int
    function: str = ""
    source: str = ""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class Reason:
    """One obstacle: what it is, where in the user's code, and what would help."""

    code: ReasonCode
    message: str
    location: Location | None = None
    hint: str = ""

    def __str__(self) -> str:
        where = f"{self.location}: " if self.location else ""
        source = f"\n    {self.location.source}" if self.location and self.location.source else ""
        hint = f"\n    -> {self.hint}" if self.hint else ""
        return f"{where}{self.message} [{self.code}]{source}{hint}"


class FxportError(Exception):
    """Base of every error that fxport raises on purpose."""


class FxportWarning(UserWarning):
    """Something was left slower than it could be; the text says what and why."""


class PortError(FxportError):
    """The model cannot be ported; `reasons` holds every obstacle found."""

    def __init__(self, reasons: Sequence[Reason]) -> None:
        self.reasons = tuple(reasons)
        times = Counter(str(r) for r in self.reasons)  # the same line in every layer
        head = "" if len(times) == 1 else f"{len(times)} obstacles:\n"
        super().__init__(head + "\n".join(_repeated(*said) for said in times.items()))

    def __reduce__(self) -> tuple[type[PortError], tuple[tuple[Reason, ...]]]:
        return type(self), (self.reasons,)


def _repeated(text: str, times: int) -> str:
    return text if times == 1 else f"{text}\n    ({times} times)"


class SavedPortError(FxportError):
    """A saved port is damaged, hostile, or from another version; nothing was loaded."""
