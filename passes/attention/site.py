"""What is found out about one attention: the records that the stages of the pass hand on."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from torch import fx

from fxport.capture.location import user_location
from fxport.errors import Location, Reason, ReasonCode
from fxport.ops.params import AttentionParams
from fxport.passes.attention.layout import Dim, Dims, Size
from fxport.passes.attention.trace import Step

__all__ = [
    "Apart",
    "AttentionSite",
    "Left",
    "MaskKind",
    "MaskStep",
    "Match",
    "RowScale",
    "Shift",
    "Term",
    "Torn",
]


class Left(Exception):
    """The site stays as it is."""

    def __init__(
        self, code: ReasonCode, message: str, node: fx.Node | None = None, hint: str = ""
    ) -> None:
        super().__init__(message)
        self.code, self.message, self.node, self.hint = code, message, node, hint

    def reason(self, start: fx.Node) -> Reason:
        """The reason, at the node in the way or else at the softmax."""
        place = user_location(self.node) if self.node is not None else None
        return Reason(self.code, self.message, place or user_location(start), self.hint)


class Torn(Left):
    """Scores or weights are reshaped across the axes that their operands show."""

    def __init__(self, message: str, node: fx.Node) -> None:
        super().__init__(ReasonCode.UNSUPPORTED_FEATURE, message, node)


class Apart(Left):
    """Nothing is seen of a product of q and k before a softmax, or of one with values after it."""

    def __init__(self, message: str, node: fx.Node | None) -> None:
        super().__init__(ReasonCode.NOT_ATTENTION, message, node)


class MaskKind(enum.Enum):
    ADD = "add"  # score + number * tensor
    FILL = "fill"  # number where tensor (or where not tensor, if inverted), score elsewhere
    MULTIPLY = "multiply"  # score * tensor
    KEEP = "keep"  # weight * tensor, before the weights are divided by their sum
    FLOOR = "floor"  # max(score, number)
    CAUSAL = "causal"  # column j forbidden in row i for j > i, said by a flag


class Shift(enum.Enum):
    """What is subtracted before exponentials: decides what a row gives that has no key at all."""

    ROW = "row"  # the maximum of the row, as a softmax does
    NONE = "none"  # nothing: exp(-1e9) and their sum are 0
    WHOLE = "whole"  # the maximum of all scores, which then depends on all rows


@dataclass(frozen=True)
class MaskStep:
    """One operation that treats scores differently along the key axis.

    Attributes:
        node: the user's operation.
        dims: dimensions of the scores that it meets; `tensor` broadcasts against them.
        logarithm: scores to which the logarithm of `tensor` is added say the same (for KEEP).
    """

    kind: MaskKind
    node: fx.Node
    dims: Dims
    tensor: fx.Node | None = None
    number: float = 1.0
    inverted: bool = False
    logarithm: bool = False

    @property
    def adds(self) -> bool:
        """Whether something is added to scores, so that their gradients see what comes after."""
        return self.kind is MaskKind.ADD or self.logarithm


@dataclass(frozen=True)
class RowScale:
    """A factor (or divisor) on scores or weights, along the queries alone or the keys alone."""

    factor: fx.Node | float
    dims: Dims
    divide: bool


@dataclass(frozen=True)
class Term:
    """A further product that is added to the scores: ``factor * q.k`` over its own `head`."""

    q: tuple[Step, ...]
    k: tuple[Step, ...]
    head: Dims
    factor: float


@dataclass(frozen=True)
class Match:
    """An attention as it stands in the graph, before anything is said about its mask.

    Attributes:
        start: the softmax (or SDPA) node.
        output: the product with V, which will be replaced.
        interior: nodes from the product of Q and K up to before `output`.
        q, k, v: the operands with how they came about, producer first.
        scores: dimensions of the scores without the key axis, in the scores' order.
        key, head, value: the key axis; what Q and K are contracted over; V's remaining axes.
        out_dims: dimensions of `output`.
        scale, softcap: as in `AttentionParams`.
        row_scales, key_scales, value_scales: factors that go onto q, k and v.
        early: what is added before the softcap and the factors; only further products may be.
        steps: masks and biases, in the order in which they apply.
        sinks: tensor whose only axis is (part of) the heads, with its dimensions; or a number.
        zero_rows: a row without an allowed key gives zeros in the original already.
        infinite_rows: but only one of -inf: one of finite numbers is a softmax like any other.
        again: a mask on the weights after the softmax, which must change nothing any more.
        without_nan: weights that are NaN are replaced by 0.
        out_scales: factors that go onto the output.
        relied_on: buffers whose value was read.
        shift: of the exponentials.
        terms: what is added to ``scale * q.k`` before everything else.
        finite: the operation that would replace NaN and infinite scores, if there is one.
    """

    start: fx.Node
    output: fx.Node
    interior: tuple[fx.Node, ...]
    q: tuple[Step, ...]
    k: tuple[Step, ...]
    v: tuple[Step, ...]
    scores: Dims
    key: Dim
    head: Dims
    value: Dims
    out_dims: Dims
    scale: float
    softcap: float = 0.0
    row_scales: tuple[RowScale, ...] = ()
    key_scales: tuple[RowScale, ...] = ()
    value_scales: tuple[RowScale, ...] = ()
    early: tuple[MaskStep, ...] = ()
    steps: tuple[MaskStep, ...] = ()
    sinks: tuple[fx.Node, Dims] | float | None = None
    dropout_p: float = 0.0
    zero_rows: bool = False
    infinite_rows: bool = False
    again: MaskStep | None = None
    without_nan: bool = False
    out_scales: tuple[RowScale, ...] = ()
    relied_on: tuple[str, ...] = ()
    shift: Shift = Shift.ROW
    terms: tuple[Term, ...] = ()
    finite: fx.Node | None = None


@dataclass(frozen=True)
class AttentionSite:
    """One attention that was rewritten to ``fxport::attention``.

    Attributes:
        module: qualified name of the user's module, or "".
        location: the user's line of the softmax.
        params: the numbers of the call; a symbolic q_offset is given as 0 here.
        mask: what the mask was proven to be, in words.
        bias: where a dense bias comes from: "", "constant", "learned" or "data".
        heads, kv_heads, head_dim, value_dim: geometry; a symbol where a size may change.
        sinks, alibi: whether the call has them.
        relied_on: qualified names of the buffers that the proof read.
        above: what every row's scores must reach, because masked ones become a finite number
            that is not far below; None where nothing is assumed.
        finite: whether scores must be finite, because others would have been replaced.
        checked: whether the graph checks that, and `above`.
        spread: what scores of a row must differ by less than, because that is added to masked
            ones; None where nothing is assumed.
    """

    module: str
    location: Location | None
    params: AttentionParams
    mask: str
    bias: str
    heads: Size
    kv_heads: Size
    head_dim: Size
    value_dim: Size
    sinks: bool = False
    alibi: bool = False
    relied_on: tuple[str, ...] = field(default=())
    above: float | None = None
    finite: bool = False
    checked: bool = False
    spread: float | None = None

    def __str__(self) -> str:
        words = [self.mask, f"{self.heads} heads"]
        if self.kv_heads != self.heads:
            words.append(f"{self.kv_heads} kv heads")
        words.append(f"scale {self.params.scale:.6g}")
        if self.params.softcap:
            words.append(f"softcap {self.params.softcap:g}")
        if self.bias:
            words.append(f"dense {self.bias} bias")
        words += [w for w, on in (("sinks", self.sinks), ("ALiBi", self.alibi)) if on]
        if self.params.dropout_p:
            words.append(f"dropout {self.params.dropout_p:g}")
        known = "checked" if self.checked else "assumed"
        if self.finite:
            words.append(f"scores {known} to be finite")
        if self.above is not None:
            words.append(f"scores {known} to be above {self.above:g}")
        if self.spread is not None:
            words.append(f"scores of a row assumed to differ by less than {self.spread:g}")
        return "fxport::attention " + ", ".join(words)
