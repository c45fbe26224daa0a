"""One token, and one row: what the graph of all other sizes says of them is compared with forward.

if x.shape[1] == 1: return self.step(x)   ->  refused, or the same numbers and gradients

Torch takes a size that may vary for two or more. What code asks about `int(T)`, and what the
library does with a 1 by itself (`squeeze`), nobody sees: numbers tell.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from fxport.backends.torch import relative_error
from fxport.capture.arguments import arguments
from fxport.capture.clone import clone_to_run, spread_constants
from fxport.capture.export import Captured
from fxport.capture.inputs import InputKind, graph_input
from fxport.capture.location import forward_line
from fxport.capture.one import line_about_one
from fxport.capture.outputs import plain
from fxport.capture.sample import device_of
from fxport.errors import Location, PortError, Reason, ReasonCode

if TYPE_CHECKING:
    from fxport.passes.tensor_parallel.build import Prepared

__all__ = ["require_ones"]

_ROWS, _TOKENS = 2, (5, 8, 37, 3, 2)
# Relative to what rounding gives at sizes that are proven; and what is rounding in any case.
_ROUNDING, _EPSILONS = 16.0, 64.0
_DRAWS = 3


def require_ones(model: nn.Module, prepared: Prepared) -> None:
    """Shows that the graph is `model` for one token and for one row, too.

    Args:
        model: in any mode; a copy in eval mode is run.
        prepared: of `model` in eval mode.

    Raises:
        PortError: it computes something else there.
    """
    if any(p.is_meta for p in prepared.captured.parameters.values()):
        _without_numbers(model, prepared.captured)
        return
    both = _Both(model, prepared)
    found = ((n, both.compare(_ROWS, n)) for n in _TOKENS)
    tokens, usual = next((pair for pair in found if pair[1] is not None), (0, None))
    if usual is None:
        raise PortError([Reason(ReasonCode.SELF_CHECK, "forward fails on random token ids")])
    bound = max(_ROUNDING * usual.error, _EPSILONS * torch.finfo(usual.dtype).eps)
    for size in ((_ROWS, 1), (1, 1), (1, tokens)):
        # Rounding may choose other experts; another path differs for all tokens.
        drawn = (both.compare(*size, seed) for seed in range(_DRAWS))
        if not any(c is None or both.same(c, usual, bound) for c in drawn):
            line = line_about_one(model, prepared.captured.graph) or forward_line(model)
            raise PortError([_refusal(size, line)])


def _refusal(size: tuple[int, int], line: Location | None) -> Reason:
    return Reason(
        ReasonCode.DEPENDS_ON_BATCH if size[1] > 1 else ReasonCode.DEPENDS_ON_LENGTH,
        f"forward gives other numbers or gradients for {size[0]} x {size[1]} tokens "
        "(rows x length) than its graph of all other sizes",
        line,
        "what is computed for a token must not depend on the number of tokens or rows",
    )


def _without_numbers(model: nn.Module, captured: Captured) -> None:
    """For parameters on the meta device."""
    line = line_about_one(model, captured.graph)
    if line is not None:
        reason = Reason(
            ReasonCode.SELF_CHECK,
            "forward may take another path for one token or one row here, and parameters on the "
            "meta device cannot be compared with numbers",
            line,
            "give the parameters numbers first",
        )
        raise PortError([reason])


class _Compared:
    """Model and graph at one size."""

    def __init__(self, expected: Tensor, found: Tensor | None) -> None:
        self.expected, self.found = expected, found
        self.dtype = expected.dtype
        self.error = float("inf")
        if found is not None:
            self.error = relative_error(found.detach(), expected.detach())


class _Both:
    """The model, and the graph of it, on the same parameters."""

    def __init__(self, model: nn.Module, prepared: Prepared) -> None:
        self.model, self.graph = clone_to_run(model), prepared.graph
        spread_constants(self.model)
        self.parameters = dict(self.model.named_parameters())
        # Ids that every table of tokens has.
        weights = (arguments(n)["weight"] for n in prepared.vocabulary)
        self.known = min((w.meta["val"].shape[0] for w in weights), default=2)

    def compare(self, rows: int, tokens: int, seed: int = 0) -> _Compared | None:
        """None where the model takes no input of this size."""
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, self.known, (rows, tokens), generator=generator)
        ids = ids.to(device_of(self.model))
        with torch.enable_grad():
            try:
                result = plain(self.model(ids))
            except Exception:
                return None
            try:
                found = self._of_graph(ids)
            except (RuntimeError, IndexError, ValueError, AssertionError):
                found = None
        return self._nearest(result, found)

    def _of_graph(self, ids: Tensor) -> Tensor:
        values = [self._given(n, ids) for n in self.graph.graph.find_nodes(op="placeholder")]
        found = fx.Interpreter(self.graph).run(*values)
        assert isinstance(found, Tensor)
        return found

    def _given(self, node: fx.Node, ids: Tensor) -> Tensor:
        given = graph_input(node)
        if given.kind is InputKind.DATA:
            return ids
        if given.kind is InputKind.PARAMETER:
            return self.parameters[given.name]
        assert given.value is not None
        return given.value

    def _nearest(self, result: Any, found: Tensor | None) -> _Compared:
        """Among several outputs the one that the graph is nearest to, or its last token."""
        leaves = [
            t
            for t in torch.utils._pytree.tree_leaves(result)
            if isinstance(t, Tensor) and t.is_floating_point() and t.dim() > 0
        ]
        if found is None:
            return _Compared(leaves[0], None)
        views = (found, found[:, -1:], found[:, -1])
        pairs = [_Compared(leaf, v) for leaf in leaves for v in views if v.shape == leaf.shape]
        return min(pairs, key=lambda c: c.error, default=_Compared(leaves[0], None))

    def same(self, here: _Compared, usual: _Compared, bound: float) -> bool:
        """Equal numbers; the parameters that get a gradient at proven sizes do, or it is zero."""
        if not here.error <= bound:
            return False
        reached, expected = (self._reached(c.expected) for c in (here, usual))
        differ = reached ^ expected
        if not differ:
            return True
        gradients = [self._gradients(y) for y in (here.expected, here.found)]
        largest = max((float(g.abs().max()) for gs in gradients for g in gs.values()), default=0.0)
        left = (gs[n] for gs in gradients for n in differ if n in gs)
        return all(float(g.abs().max()) <= bound * largest for g in left)

    def _reached(self, value: Tensor) -> set[str]:
        """The parameters that gradients of `value` go to."""
        names = {id(p): n for n, p in self.parameters.items()}
        found, seen, pending = set(), set(), [value.grad_fn]
        while pending:
            function = pending.pop()
            if function is None or function in seen:
                continue
            seen.add(function)
            name = names.get(id(getattr(function, "variable", None)))
            found |= {name} if name is not None else set()
            pending += [before for before, _ in function.next_functions]
        return found

    def _gradients(self, value: Tensor | None) -> Mapping[str, Tensor]:
        if value is None or not value.requires_grad:
            return {}
        trained = {n: p for n, p in self.parameters.items() if p.requires_grad}
        weights = torch.randn(value.shape, generator=torch.Generator().manual_seed(0))
        found = torch.autograd.grad(
            (value * weights.to(value)).sum(), list(trained.values()), allow_unused=True
        )
        return {n: g for n, g in zip(trained, found, strict=True) if g is not None}
