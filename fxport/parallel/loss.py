"""Cross entropy on logits that stay divided over the vocabulary.

Before                                    After, on each rank
    y = gather(linear(h, W[rows]))            part = linear(h, W[rows])        [B, T, V_rank]
    loss = cross_entropy(y, targets)          peak = maximum over ranks        [B, T]
                                              sums of exp(part - peak) and of
                                              the target's logit, reduced      [2, B, T]
                                              loss = log(sum) + peak - logit

Three numbers a token travel instead of V logits, and no rank holds more than its part of them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.autograd.function import once_differentiable

from fxport.errors import FxportError
from fxport.parallel.context import ParallelContext
from fxport.parallel.modules import Gather
from fxport.parallel.plan import Plan

__all__ = ["TokenLoss"]


class TokenLoss(nn.Module):
    """The mean loss of a divided model: ``loss = TokenLoss(fxport.parallelize(model, ctx))``.

    ``loss(tokens, targets)``, both ``[B, T]``, is ``F.cross_entropy`` of the model's logits, taken
    in float32 (float64 where they are), and so are its gradients. Where the logits are what a
    divided head makes, they are not gathered; where the model does more with them, they are.

    Use it in place of the divided module, whose parameters it shares (they are ``loss.model``'s).

    Args:
        module: what `fxport.parallelize` returned, for a model that returns its logits.
        ignore_index: targets that do not count. Other targets outside the vocabulary give NaN.

    Raises:
        FxportError: the module is not one of those, or it returns something else than one tensor.
    """

    def __init__(self, module: fx.GraphModule, ignore_index: int = -100) -> None:
        super().__init__()
        if not isinstance(module, fx.GraphModule) or not isinstance(
            getattr(module, "plan", None), Plan
        ):
            raise FxportError("TokenLoss takes what fxport.parallelize returns")
        output = module.graph.output_node().args[0]
        if not isinstance(output, fx.Node):
            raise FxportError("TokenLoss takes a model that returns its logits and nothing else")
        self.ignore_index = ignore_index
        gather = _final_gather(module, output)
        self.context: ParallelContext | None = gather.context if gather else None
        self.limits = (0, 0, 0)  # this rank's first row and the end of its rows, all rows
        if gather is not None:
            first = sum(gather.sizes[: gather.context.rank])
            own = gather.sizes[gather.context.rank]
            self.limits = (first, first + own, sum(gather.sizes))
        self.model = module if gather is None else _without_gather(module)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        logits = self.model(tokens)
        counted = targets != self.ignore_index
        if self.context is None:
            inside = (targets >= 0) & (targets < logits.shape[-1])
            losses = F.cross_entropy(
                _wide(logits).flatten(0, -2), targets.where(inside, 0).flatten(), reduction="none"
            ).view(targets.shape)
        else:
            first, _, size = self.limits
            inside = (targets >= 0) & (targets < size)
            losses = _Losses.apply(logits, targets - first, self.context)
        losses = losses.where(inside, torch.nan).where(counted, 0.0)
        return losses.sum() / counted.sum()


def _final_gather(module: fx.GraphModule, output: fx.Node) -> Gather | None:
    """The collective that makes the logits whole, if it is the last thing that happens."""
    if output.op != "call_module" or len(output.users) > 1:
        return None
    found = module.get_submodule(str(output.target))
    return found if isinstance(found, Gather) else None


def _without_gather(module: fx.GraphModule) -> fx.GraphModule:
    """The same parameters and buffers; returns this rank's logits."""
    graph = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    graph.graph_copy(module.graph, made)
    gather = module.graph.output_node().all_input_nodes[0]
    graph.output(made[gather.all_input_nodes[0]])
    graph.erase_node(made[gather])
    result = fx.GraphModule(module, graph)
    for name, child in module.named_children():  # also what the graph does not name
        if name != gather.target:
            result.add_module(name, child)
    for name, parameter in module.named_parameters(recurse=False):
        result.register_parameter(name, parameter)
    result.train(module.training)
    result.plan = module.plan
    return result


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _hits(part: Tensor, own: Tensor) -> Tensor:
    """Where the target is: ``[.., V_rank]`` from its position among this rank's rows ``[..]``.

    A comparison, not a scatter: a compiler fuses it with what is around it.
    """
    return torch.arange(part.shape[-1], device=part.device) == own.unsqueeze(-1)


class _Losses(torch.autograd.Function):
    """One loss a token ``[B, T]``; keeps the logits in their own dtype for backward."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, own: Tensor, context: ParallelContext) -> Tensor:
        x = _wide(part)
        peak = context.transport.all_reduce(x.amax(-1), maximum=True)
        total = (x - peak.unsqueeze(-1)).exp().sum(-1)
        picked = x.where(_hits(part, own), 0.0).sum(-1)
        total, picked = context.transport.all_reduce(torch.stack((total, picked))).unbind()
        lse = total.log() + peak
        ctx.save_for_backward(part, own, lse)
        return lse - picked

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        part, own, lse = ctx.saved_tensors
        weights = (_wide(part) - lse.unsqueeze(-1)).exp()
        found = (weights - _hits(part, own).to(weights)) * grad.unsqueeze(-1)
        return found.to(part.dtype), None, None
