"""Products of an activation and a weight, in the letters of einsum.

matmul(x, w)  [.., T, K] [K, N] -> [.., T, N]        einsum("btd,edh->bteh", x, w)
expert_linear(x, w, experts)  [.., K] [E, N, K] -> [.., N]

Each letter is one of

| kind    | activation | weight | result | example: experts "bteh,ehd->bted" |
| row     | yes        |        | yes    | b, t                              |
| shared  | yes        | yes    | yes    | e                                 |
| summed  | yes        | yes    |        | h                                 |
| new     |            | yes    | yes    | d                                 |
| chosen  |            | yes    |        | the experts of `expert_linear`    |
"""

from __future__ import annotations

import string
from collections.abc import Container
from dataclasses import dataclass

import torch
from torch import fx

import fxport.ops.experts  # noqa: F401  (registers the op)
from fxport.capture.arguments import arguments, shape_of

__all__ = ["BY_EXPERT", "PRODUCTS", "Contraction", "contraction", "letters", "operands_of"]

aten = torch.ops.aten
BY_EXPERT = torch.ops.fxport.expert_linear.default
_MATMULS = (aten.matmul.default, aten.bmm.default, aten.mm.default)
PRODUCTS = (*_MATMULS, aten.einsum.default, BY_EXPERT)


@dataclass(frozen=True)
class Contraction:
    """One product; every letter of an operand is one of its dimensions.

    Attributes:
        data, weight: the operands.
        of_data, of_weight, of_result: their letters.
    """

    data: fx.Node
    weight: fx.Node
    of_data: str
    of_weight: str
    of_result: str

    @property
    def rows(self) -> str:
        return "".join(c for c in self.of_data if c not in self.of_weight)

    @property
    def shared(self) -> str:
        return "".join(c for c in self.of_data if c in self.of_weight and c in self.of_result)

    @property
    def summed(self) -> str:
        return "".join(c for c in self.of_data if c not in self.of_result)

    @property
    def new(self) -> str:
        return "".join(c for c in self.of_result if c not in self.of_data)


def contraction(node: fx.Node, activations: Container[fx.Node]) -> Contraction | None:
    """The node as a product of one activation and one weight; None if it is none."""
    found = letters(node)
    if found is None:
        return None
    operands, (left, right, result) = found
    if (operands[0] in activations) is (operands[1] in activations):
        return None
    first = operands[0] in activations
    data, weight = operands if first else operands[::-1]
    of_data, of_weight = (left, right) if first else (right, left)
    product = Contraction(data, weight, of_data, of_weight, result)
    summed_alone = any(c not in of_weight for c in product.summed)
    dropped = any(c not in of_data and c not in result for c in of_weight)
    sizes = dict(zip(of_data, shape_of(data), strict=True))
    broadcast = any(
        c in sizes and sizes[c] != n for c, n in zip(of_weight, shape_of(weight), strict=True)
    )
    dropped = dropped and node.target is not BY_EXPERT
    return None if summed_alone or dropped or broadcast else product


def operands_of(node: fx.Node) -> list[fx.Node]:
    """What is multiplied, in the order of the letters."""
    if node.target is aten.einsum.default:
        return list(arguments(node)["tensors"])
    if node.target is BY_EXPERT or node.target is aten.linear.default:
        return list(node.all_input_nodes[:2])
    return list(node.all_input_nodes)


def letters(node: fx.Node) -> tuple[list[fx.Node], tuple[str, str, str]] | None:
    """Two operands, and the letters of both and of the result; None where there is no such form."""
    operands = operands_of(node)
    if node.target is aten.einsum.default:
        equation = arguments(node)["equation"].replace(" ", "")
        if len(operands) != 2 or "->" not in equation:
            return None
        inputs, result = equation.split("->")
        left, right = inputs.split(",")
        if "..." in left + right + result:
            rest = left.replace("...", "") + right.replace("...", "")
            if "..." in right or "..." not in left:
                return None
            count = len(shape_of(operands[0])) - len(left) + 3
            free = "".join(c for c in string.ascii_letters if c not in rest)[:count]
            left, result = left.replace("...", free), result.replace("...", free)
    elif node.target is aten.linear.default:
        rows = string.ascii_lowercase[: len(shape_of(operands[0])) - 1]
        left, right, result = rows + "Y", "ZY", rows + "Z"
    elif node.target is BY_EXPERT:
        rows = string.ascii_lowercase[: len(shape_of(arguments(node)["experts"]))]
        left, right, result = rows + "Y", "EZY", rows + "Z"
    elif node.target in _MATMULS:
        ranks = [len(shape_of(n)) for n in operands]
        if len(operands) != 2 or min(ranks) < 2:
            return None
        batch = string.ascii_lowercase[: max(ranks) - 2]
        left = batch[len(batch) - (ranks[0] - 2) :] + "XY"
        right = batch[len(batch) - (ranks[1] - 2) :] + "YZ"
        result = batch + "XZ"
    else:
        return None
    if any(len(set(part)) != len(part) for part in (left, right, result)):
        return None
    return operands, (left, right, result)
