"""Where a value goes when it enters the body of a higher-order operation, and where it comes out.

w = getitem(checkpoint(body, s), 0)       s -> placeholder of body;  output 0 of body -> w
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

from torch import fx
from torch._ops import HigherOrderOperator

from fxport.capture.dynamo import PLAIN_BODIES

__all__ = ["Body", "body_of"]


@dataclass(frozen=True)
class Body:
    """What a higher-order operation runs on its operands.

    Attributes:
        node: the call.
        gm: its body; of an ``autograd.Function`` the forward.
        operands: of the call, one for each of the last placeholders.
    """

    node: fx.Node
    gm: fx.GraphModule
    operands: tuple[object, ...]

    def entered(self, value: fx.Node) -> list[fx.Node]:
        """The placeholders that stand for a value."""
        placeholders = self.gm.graph.find_nodes(op="placeholder")
        inner = placeholders[len(placeholders) - len(self.operands) :]
        return [p for p, o in zip(inner, self.operands, strict=True) if o is value]

    def left(self, value: fx.Node) -> list[fx.Node]:
        """The nodes outside that stand for a value that the body returns."""
        (output,) = self.gm.graph.find_nodes(op="output")
        returned = output.args[0]
        if isinstance(returned, fx.Node):
            return [self.node] if returned is value else []
        assert isinstance(returned, tuple | list)
        if returned and isinstance(returned[0], tuple | list):
            returned = returned[0]  # what an autograd.Function saves comes after
        places = [i for i, r in enumerate(returned) if r is value]
        picks = [u for u in self.node.users if u.target is operator.getitem]
        return [u for u in picks if u.args[1] in places]


def body_of(gm: fx.GraphModule, node: fx.Node) -> Body | None:
    """The body that a call of `gm` runs, if it runs one as ordinary code."""
    if not isinstance(node.target, HigherOrderOperator) or node.target.name() not in PLAIN_BODIES:
        return None
    bodies = [a for a in node.args if isinstance(a, fx.Node) and a.op == "get_attr"]
    graphs = [getattr(gm, str(a.target), None) for a in bodies]
    first = graphs[0] if graphs else None
    if not isinstance(first, fx.GraphModule):
        return None
    count = sum(isinstance(graph, fx.GraphModule) for graph in graphs)
    operands = [a for a in node.args[count:] if not isinstance(a, str)]
    placeholders = first.graph.find_nodes(op="placeholder")
    return Body(node, first, tuple(operands)) if len(operands) <= len(placeholders) else None
