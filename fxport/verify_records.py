"""What `fxport.verify` found, as data and as a table."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Comparison", "FirstDifference", "Verification"]


@dataclass(frozen=True)
class Comparison:
    """One way to run the port, compared with the original.

    Attributes:
        what: ``"weights"``, ``"graph"``, ``"trainable module"``, ``"engine: chunked prefill"``.
        compared: what was looked at, in words with numbers.
        difference: the largest difference of a log-probability (natural logarithm), or None where
            values are compared for equality.
        bound: the difference that counts as rounding.
        equal: whether everything agrees.
        detail: the first place that differs, or "".
    """

    what: str
    compared: str
    difference: float | None
    bound: float | None
    equal: bool
    detail: str = ""


@dataclass(frozen=True)
class FirstDifference:
    """The first operation whose result differs.

    Attributes:
        between: the two runs compared, in words.
        operation: name of the node in the saved graph, or of the weight.
        target: the operation, e.g. ``"aten.linear.default"``; "" for a weight.
        module: the user's module, or "".
        detail: by how much, or what.
    """

    between: str
    operation: str
    target: str = ""
    module: str = ""
    detail: str = ""

    def __str__(self) -> str:
        target = f" ({self.target})" if self.target else ""
        module = f" in `{self.module}`" if self.module else ""
        return f"{self.between}: first at `{self.operation}`{target}{module}: {self.detail}"


@dataclass(frozen=True)
class Verification:
    """The result of `fxport.verify`. True where the port and the original agree everywhere."""

    comparisons: tuple[Comparison, ...]
    first: FirstDifference | None = None

    @property
    def ok(self) -> bool:
        return all(c.equal for c in self.comparisons)

    def __bool__(self) -> bool:
        return self.ok

    def to_dict(self) -> dict[str, Any]:
        return {"ok": self.ok, **asdict(self)}

    def __str__(self) -> str:
        from tabulate import tabulate

        rows = [
            (
                c.what,
                c.compared,
                "" if c.difference is None else f"{c.difference:.1e}",
                "equal" if c.equal else "DIFFERS",
            )
            for c in self.comparisons
        ]
        header = ("run", "compared with the original", "largest", "")
        table = tabulate(rows, header, maxcolwidths=[26, 30, 8, 8], disable_numparse=True)
        details = [f"{c.what}: {c.detail}" for c in self.comparisons if c.detail]
        first = [str(self.first)] if self.first else []
        return "\n".join([table, *([""] if details or first else []), *details, *first])
