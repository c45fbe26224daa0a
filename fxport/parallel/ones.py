"""One token, and one row: what the graph of all other sizes says of them is compared with forward.

if x.shape[1] == 1: return self.step(x)   ->  the same numbers and gradients, or two are needed

Torch takes a size that may vary for two or more. What code asks about `int(T)`, and what the
library does with a 1 by itself (`squeeze`), nobody sees: numbers tell.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from fxport.backends.torch import relative_error
from fxport.capture.arguments import arguments
from fxport.capture.clone import clone_to_run, spread_constants, take_modes
from fxport.capture.export import Captured
from fxport.capture.inputs import InputKind, graph_input
from fxport.capture.location import forward_line
from fxport.capture.one import line_about_one
from fxport.capture.outputs import plain
from fxport.capture.sample import device_of
from fxport.errors import Location, Reason, ReasonCode
from fxport.parallel.dropout import WithoutDropout
from fxport.parallel.sizes import Smallest

if TYPE_CHECKING:
    from fxport.passes.tensor_parallel.build import Prepared

__all__ = ["smallest_sizes"]

_ROWS, _TOKENS = 2, (5, 8, 37, 3, 2)
# Relative to what rounding gives at sizes that are proven; and what is rounding in any case.
_ROUNDING, _EPSILONS = 16.0, 64.0
_DRAWS = 3


def smallest_sizes(models: Sequence[nn.Module], prepared: Prepared) -> Smallest:
    """Whether the graph is shown to be the model for one token and for one row, too.

    Args:
        models: the model in eval mode, and in every other mode in which its graph is to be used;
            there dropout is left out.
        prepared: of the model in eval mode.
    """
    if any(p.is_meta for p in prepared.captured.parameters.values()):
        found = [_without_numbers(model, prepared.captured) for model in models]
    else:
        found = _by_numbers(models, prepared)
    rows, tokens = max(f.rows for f in found), max(f.tokens for f in found)
    return Smallest(rows, tokens, next((f.reason for f in found if f.reason is not None), None))


def _by_numbers(models: Sequence[nn.Module], prepared: Prepared) -> list[Smallest]:
    evaluating, *others = [_Both(model, prepared) for model in models]
    tried = ((n, evaluating.compare(_ROWS, n)) for n in _TOKENS)
    tokens, usual = next((pair for pair in tried if pair[1] is not None), (0, None))
    if usual is None:
        return [_not_compared("forward fails on random token ids", forward_line(models[0]))]
    bound = max(_ROUNDING * usual.error, _EPSILONS * torch.finfo(usual.dtype).eps)
    found = [_smallest(evaluating, prepared.captured, tokens, usual, bound)]
    for both in others:
        usual = both.compare(_ROWS, tokens)
        if usual is None or not usual.error <= bound:
            why = "in training mode it differs by more than what dropout does"
            found.append(_not_compared(why, forward_line(both.original)))
        else:
            found.append(_smallest(both, prepared.captured, tokens, usual, bound))
    return found


def _smallest(
    both: _Both, captured: Captured, tokens: int, usual: _Compared, bound: float
) -> Smallest:
    """In one mode, where numbers closer than `bound` are the same."""
    model = both.original

    def differs(rows: int, length: int) -> bool:
        # Rounding may choose other experts; another path differs for all tokens.
        drawn = (both.compare(rows, length, seed) for seed in range(_DRAWS))
        return not any(c is None or both.same(c, usual, bound) for c in drawn)

    one_row = differs(1, tokens)
    one_token = differs(_ROWS, 1) or (not one_row and differs(1, 1))
    if not one_row and not one_token:
        return Smallest(1, 1)
    line = line_about_one(model, captured.graph, own_modes=True) or forward_line(model)
    return Smallest(1 + one_row, 1 + one_token, _reason(one_row, one_token, both.training, line))


def _reason(one_row: bool, one_token: bool, training: bool, line: Location | None) -> Reason:
    what = " and ".join(["one row"] * one_row + ["one token"] * one_token)
    what += " in training mode" if training else ""
    return Reason(
        ReasonCode.DEPENDS_ON_LENGTH if one_token else ReasonCode.DEPENDS_ON_BATCH,
        f"forward gives other numbers or gradients for {what} than its graph of all other sizes",
        line,
        "what is computed for a token must not depend on the number of tokens or rows",
    )


def _without_numbers(model: nn.Module, captured: Captured) -> Smallest:
    """For parameters on the meta device."""
    line = line_about_one(model, captured.graph, own_modes=True)
    if line is None:
        return Smallest(1, 1)
    return _not_compared("parameters on the meta device have no numbers", line)


def _not_compared(why: str, line: Location | None) -> Smallest:
    reason = Reason(
        ReasonCode.SELF_CHECK,
        f"forward may take another path for one token or one row, and was not compared: {why}",
        line,
    )
    return Smallest(2, 2, reason)


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
        self.original, self.graph = model, prepared.graph
        self.model = clone_to_run(model)
        take_modes(self.model, model)
        self.training = any(module.training for module in model.modules())
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
                with WithoutDropout():
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
