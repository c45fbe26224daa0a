"""Whether one token is computed as many are.

if T == 1: return self.shortcut(x)      another path: the graph does not hold for T = 1
if T > 1: scores += mask                another path, the same result: shown with numbers

Torch takes a length that may vary for two or more, and answers what is asked about it accordingly,
without a guard.
"""

from __future__ import annotations

from collections.abc import Sequence

import sympy
import torch
from torch import fx, nn

from fxport.capture.inputs import InputKind, graph_input
from fxport.capture.questions import answer
from fxport.capture.sample import Sample, take_sample
from fxport.capture.trace import quiet
from fxport.errors import PortError

__all__ = ["takes_one_token"]

_ROWS = 2
_MOST = 10**8  # parameters that are given numbers
_ROUNDING = 1e3  # times that of one operation


def takes_one_token(
    model: nn.Module, questions: Sequence[sympy.Basic], length: sympy.Symbol, graph: fx.GraphModule
) -> bool:
    """Whether `graph` holds for one token too; False where that cannot be shown.

    Where forward asks nothing that one token answers otherwise than two, it runs the same
    operations. Else outputs and gradients are compared, with random parameters: those of a model
    may hide a path (a projection that starts at zero).

    Args:
        model: a clone from `clone_for_capture`.
        questions: what forward asks about sizes.
        length: the symbol of T.
        graph: the symbolic graph of `model`.
    """
    asked = [q for q in dict.fromkeys(questions) if q.free_symbols == {length}]
    with quiet():
        if all(answer(q, length, 1) == answer(q, length, 2) for q in asked):
            return True
    try:
        one = take_sample(model, _ROWS, 1)
    except PortError:  # it takes none
        return False
    return _alike(one, graph)


def _alike(one: Sample, graph: fx.GraphModule) -> bool:
    """Whether both give the same logits and gradients for one token."""
    shapes = {
        graph_input(n).name: n.meta["val"]
        for n in (*_inputs(one.graph), *_inputs(graph))
        if graph_input(n).kind is InputKind.PARAMETER
    }
    dtypes = {p.dtype for p in shapes.values()}
    exact = dtypes <= {torch.float32, torch.float64}
    if not exact or sum(p.numel() for p in shapes.values()) > _MOST:
        return False
    generator = torch.Generator().manual_seed(0)
    parameters = {
        name: torch.randn(p.shape, generator=generator, dtype=p.dtype).mul_(0.3).requires_grad_()
        for name, p in shapes.items()
    }
    ids = torch.arange(1, _ROWS + 1).unsqueeze(1)
    tolerance = _ROUNDING * max(torch.finfo(dtype).eps for dtype in dtypes)
    found = [_run(g, parameters, ids) for g in (one.graph, graph)]
    return all(  # NaN equals nothing
        torch.allclose(a, b, rtol=tolerance, atol=tolerance * float(a.abs().max()))
        for a, b in zip(*found, strict=True)
    )


def _inputs(graph: fx.GraphModule) -> list[fx.Node]:
    return list(graph.graph.find_nodes(op="placeholder"))


def _run(
    graph: fx.GraphModule, parameters: dict[str, torch.Tensor], ids: torch.Tensor
) -> list[torch.Tensor]:
    """Logits ``[B, 1, V]``, and the gradients of their weighted sum by every parameter."""
    given = []
    for node in _inputs(graph):
        found = graph_input(node)
        if found.kind is InputKind.PARAMETER:
            given.append(parameters[found.name])
        elif found.kind is InputKind.DATA:
            given.append(ids)
        else:
            assert found.value is not None, found
            given.append(found.value.clone())  # the graph may write to it
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # dropout
        result = graph(*given)
    logits = result if isinstance(result, torch.Tensor) else result[0]
    weights = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view(logits.shape)
    with torch.enable_grad():
        gradients = torch.autograd.grad(
            (logits * weights).sum(), list(parameters.values()), materialize_grads=True
        )
    return [logits.detach(), *gradients]
