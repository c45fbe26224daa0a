"""Builds a symbolic graph node by node, every shape checked against the samples it stands for.

call(view, x, [B, T, 64])  ->  node with a fake value; its shape at T = 37 is the sample's
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)

from fxport.capture.arguments import shape_of, shape_of_tensor
from fxport.capture.every_row import EVERY_ROW
from fxport.capture.inputs import GraphInput, InputKind, add_input, graph_input
from fxport.capture.location import user_location
from fxport.capture.sample import Sample
from fxport.capture.trace import in_one_line
from fxport.errors import PortError, Reason, ReasonCode

__all__ = ["Emitter", "Unified", "symbolic_tokens"]

aten = torch.ops.aten


def symbolic_tokens(
    mode: FakeTensorMode, ids: torch.Tensor, dynamic: Sequence[DimDynamic]
) -> tuple[Any, Any, torch.Tensor]:
    """Fake token ids ``[B, T]`` and the expressions of B and T; the real sizes are the hints."""
    context: StatelessSymbolicContext[Any, Any] = StatelessSymbolicContext(
        dynamic_sizes=list(dynamic)
    )
    fake = mode.from_tensor(ids, symbolic_context=context)
    batch, length = shape_of_tensor(fake)
    return batch, length, fake


@dataclass(frozen=True)
class Unified:
    """The symbolic graph.

    Attributes:
        graph: as `fxport.capture.export.Captured.graph`, all outputs of the samples kept.
        tokens: its DATA placeholder.
        batch, length: the symbols of B and T.
        shapes: collects what torch had to know about B and T.
    """

    graph: fx.GraphModule
    tokens: fx.Node
    batch: sympy.Symbol
    length: sympy.Symbol
    shapes: ShapeEnv


def _identifier(name: str) -> str:
    """A Python name for a qualified one: those of an `nn.Sequential` begin with a number."""
    plain = name.replace(".", "_")
    return plain if plain.isidentifier() else f"p_{plain}"


class Emitter:
    """Builds the symbolic graph: every node gets a fake value, checked against the samples."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = samples
        self.gm = fx.GraphModule({}, fx.Graph())
        self.graph = fx.Graph()
        self.shapes = ShapeEnv()
        self.mode = FakeTensorMode(shape_env=self.shapes, allow_non_fake_inputs=True)
        # The sizes of the first sample are the hints: they share no factors with anything.
        first = samples[0]
        device = first.tokens.meta["val"].device
        ids = torch.zeros(first.batch, first.length, dtype=torch.long, device=device)
        self.batch, self.length, fake = symbolic_tokens(self.mode, ids, [DimDynamic.DYNAMIC] * 2)
        self.tokens = self.placeholder(graph_input(first.tokens), fake)
        self._sizes: dict[sympy.Expr, fx.Node] = {}
        self._inputs: dict[str, fx.Node] = {}

    def placeholder(self, source: GraphInput, fake: Any = None) -> fx.Node:
        """An input of the graph, after those that exist."""
        with self.graph.inserting_after(self._last_input()):
            node = add_input(self.graph, _identifier(source.name))
        if fake is None:
            assert source.value is not None
            fake = self.mode.from_tensor(source.value, static_shapes=True)
        node.meta.update(input=source, val=fake)
        return node

    def _last_input(self) -> fx.Node | None:
        inputs = self.graph.find_nodes(op="placeholder")
        return inputs[-1] if inputs else None

    def table(self, value: torch.Tensor, nodes: tuple[fx.Node, ...]) -> fx.Node:
        """A constant, by its name in the model where it has one."""
        source = graph_input(nodes[-1]) if nodes[-1].op == "placeholder" else None
        if source is None or source.value is not value:
            name = f"constant_{len(self._inputs)}"
            source = GraphInput(InputKind.BUFFER, name, value.contiguous())
        if source.name not in self._inputs:
            self._inputs[source.name] = self.placeholder(source)
        return self._inputs[source.name]

    def size(self, expression: sympy.Expr) -> fx.Node | int:
        """A node (or number) for ``a T + b`` and the like."""
        if expression.is_Integer:
            return int(expression)
        if expression in self._sizes:
            return self._sizes[expression]
        if expression in (self.batch, self.length):
            axis = 0 if expression == self.batch else 1
            with self.graph.inserting_after(self._last_input()):
                node = self._make(aten.sym_size.int, (self.tokens, axis), {})
        else:
            call = operator.add if expression.is_Add else operator.mul
            parts = [self.size(part) for part in expression.args]
            node = parts[0]  # type: ignore[assignment]
            for part in parts[1:]:
                node = self._make(call, (node, part), {})
        self._sizes[expression] = node
        return node

    def call(
        self,
        target: Any,
        args: Any,
        kwargs: Any,
        nodes: Sequence[fx.Node],
        *,
        check: bool = True,
    ) -> fx.Node:
        """A call, with the source facts of the first sample's node."""
        try:
            node = self._make(target, args, kwargs)
        except Exception as error:  # torch has no symbolic shapes for some operations
            reason = Reason(
                ReasonCode.DEPENDS_ON_LENGTH,
                f"`{target}` has no shape for every length: {in_one_line(error)}",
                user_location(nodes[0]),
            )
            raise PortError([reason]) from error
        kept = ("stack_trace", "nn_module_stack", "custom", "source_fn_stack", EVERY_ROW)
        node.meta.update({k: v for k, v in nodes[0].meta.items() if k in kept})
        if check:
            self._check(node, nodes)
        return node

    def _make(self, target: Callable[..., Any], args: Any, kwargs: Any) -> fx.Node:
        node = self.graph.call_function(target, tuple(args), dict(kwargs))
        values = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: n.meta["val"])
        # The C++ side of torch 2.11 takes symbolic sizes of a matmul for constants.
        with self.mode, torch.no_grad(), enable_python_dispatcher():
            node.meta["val"] = target(*values[0], **values[1])
        return node

    def _check(self, node: fx.Node, nodes: Sequence[fx.Node]) -> None:
        """The symbolic shape, at each sample's sizes, is that sample's."""
        if not isinstance(node.meta["val"], torch.Tensor):
            return
        for sample, other in zip(self.samples, nodes, strict=True):
            sizes = {self.batch: sample.batch, self.length: sample.length}
            here = tuple(sympy.sympify(s).subs(sizes) for s in shape_of(node))
            there = tuple(other.meta["val"].shape)
            # A size that the data decides has no number here: it equals none.
            if here != there or node.meta["val"].dtype != other.meta["val"].dtype:
                reason = Reason(
                    ReasonCode.DEPENDS_ON_LENGTH,
                    f"`{node.target}` gives {there} for {sample.length} tokens, not {here}",
                    user_location(other),
                )
                raise PortError([reason])

    def finish(self) -> Unified:
        self.graph.eliminate_dead_code()
        self.gm.graph = self.graph
        self.gm.recompile()
        return Unified(self.gm, self.tokens, self.batch, self.length, self.shapes)
