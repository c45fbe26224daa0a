"""The graph of one plain length, and which of its values are constants.

model, B=3, T=53  ->  Sample(graph of plain sizes, what depends on tokens, constants by value)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot, set_proxy_slot

from fxport.capture.caches import read_what_was_written
from fxport.capture.clone import watch_attributes
from fxport.capture.constants import run_constants
from fxport.capture.inputs import InputKind, graph_input
from fxport.capture.listed_places import fill_listed_places
from fxport.capture.location import forward_line, user_location
from fxport.capture.logits import keep_logits
from fxport.capture.memory import Memory
from fxport.capture.paths import Path, followed_calls
from fxport.capture.selections import Empties
from fxport.capture.skips import without_selections
from fxport.capture.state import State
from fxport.capture.trace import aliases_of, explain_failure, export, graph_of
from fxport.capture.whole import make_whole
from fxport.errors import PortError, Reason, ReasonCode

__all__ = ["Sample", "analysed_again", "device_of", "sample_of", "take_sample", "with_values"]


@dataclass(frozen=True)
class Sample:
    """A graph of plain sizes.

    Attributes:
        batch, length: B and T.
            graph: placeholders carry `GraphInput`; the only output is the logits.
        tokens: the DATA placeholder.
        output: the output node.
        memory: who shares memory with whom.
        needed: nodes that the output depends on.
        data: nodes that depend on the token ids, through memory too; and those that depend on
            values made of parameters that are written to, of which the order counts as well.
        learned: nodes that depend on parameters.
        varying: the nodes of `data` that the output needs, in order.
        logits: which output of the model is kept, in words.
        changed: what forward changed in the model's state, and the next call may read.
        overwritten: attributes that it changed, and read no sooner: (module path, name).
        read: attributes that it read before it set them; None for all of a module's.
        unkept: inputs that forward writes to and the output does not depend on.
        history: lengths of earlier calls.
        paths: what the user's code did in each call of the trace.
    """

    batch: int
    length: int
    graph: fx.GraphModule
    tokens: fx.Node
    output: fx.Node
    memory: Memory
    needed: frozenset[fx.Node]
    data: frozenset[fx.Node]
    learned: frozenset[fx.Node]
    varying: tuple[fx.Node, ...]
    logits: str
    changed: tuple[Reason, ...]
    unkept: tuple[str, ...] = ()
    history: tuple[int, ...] = ()
    paths: tuple[Path, ...] = field(default=(), repr=False)
    overwritten: Mapping[tuple[str, str], Reason] = field(default_factory=dict, repr=False)
    read: frozenset[tuple[str, str | None]] = field(default=frozenset(), repr=False)
    _values: dict[fx.Node, Any] = field(default_factory=dict, repr=False)

    def value(self, node: fx.Node) -> Any:
        """What a constant holds when others read it.

        Raises:
            PortError: it is written to after something that is no constant has read it.
        """
        if node not in self._values:
            constants = [n for n in self.graph.graph.nodes if self._is_constant(n)]
            passing = {n for n in constants if self._is_read_by_constants_alone(n)} - {node}
            self._values.update(run_constants(constants, self.memory, passing))
        self._check_order(node)
        return self._values[node]

    @property
    def largest(self) -> int:
        """Bytes of the largest constant, before any is made."""
        values = (n.meta.get("val") for n in self.graph.graph.nodes if self._is_constant(n))
        return max((v.nbytes for v in values if isinstance(v, torch.Tensor)), default=0)

    def _is_constant(self, node: fx.Node) -> bool:
        varies = node in self.data or node in self.learned or node.op == "output"
        return node in self.needed and not varies

    def _is_read_by_constants_alone(self, node: fx.Node) -> bool:
        return all(self._is_constant(user) for user in node.users if user in self.needed)

    def _check_order(self, node: fx.Node) -> None:
        writes = self.memory.written_by(node)
        if not writes:
            return
        root = self.memory.shared(node)
        order = {n: i for i, n in enumerate(self.graph.graph.nodes)}
        last = max(order[n] for n in writes)
        for reader in self.graph.graph.nodes:
            reads = any(self.memory.shared(i) is root for i in reader.all_input_nodes)
            outside = reader in self.data or reader in self.learned
            if reads and outside and order[reader] < last:
                reason = Reason(
                    ReasonCode.MUTATED_IN_PLACE,
                    "a constant is changed in place after it was used",
                    user_location(writes[-1]),
                    "use the out-of-place operation",
                )
                raise PortError([reason])


def take_sample(
    model: nn.Module,
    batch: int,
    length: int,
    history: Sequence[int] = (),
    *,
    every_pair: bool = False,
) -> Sample:
    """Captures `model` at one batch size and length.

    Args:
        model: a clone from `clone_for_capture`; its state is put back afterwards.
        history: lengths of earlier calls, on other tokens, that the model has seen before.
        every_pair: see `without_selections`.

    Raises:
        PortError: forward fails at these sizes, or keeps tokens of earlier calls.
    """
    inputs = tuple(
        torch.zeros(batch, n, dtype=torch.long, device=device_of(model)) for n in (length, *history)
    )
    aliases = aliases_of(model)
    left = _Left()
    paths: list[Path] = []

    def graph_with(empty: Empties, following: AbstractContextManager[None]) -> fx.GraphModule:
        with _watched(model, left, alone=not history), following:
            try:
                exported = export(model, inputs, None, empty)
            except Exception as error:  # any failure of user code
                raise PortError([explain_failure(error)]) from error
        return graph_of(exported, aliases)

    def again(empty: Empties) -> fx.GraphModule:
        other = graph_with(empty, nullcontext())
        keep_logits(other)
        read_what_was_written(other)
        return other

    graph = graph_with(frozenset[int]().__contains__, followed_calls(model, paths))
    logits = keep_logits(graph)
    unkept = read_what_was_written(graph)
    without_selections(graph, again, every_pair=every_pair)
    fill_listed_places(graph)  # not sooner: an empty selection is such a list, too
    make_whole(graph, batch, length)
    sample = _analysed(graph, batch, length, logits, left.changed)
    return replace(
        sample,
        unkept=unkept,
        history=tuple(history),
        paths=tuple(paths),
        overwritten=left.overwritten,
        read=frozenset(left.read),
    )


def device_of(model: nn.Module) -> torch.device:
    """Where the token ids of a model live."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


@dataclass
class _Left:
    """What the calls of one or more traces left on the model; see `Sample`."""

    changed: list[Reason] = field(default_factory=list)
    overwritten: dict[tuple[str, str], Reason] = field(default_factory=dict)
    read: set[tuple[str, str | None]] = field(default_factory=set)

    def add(self, changed: Iterable[Reason]) -> None:
        self.changed += (reason for reason in changed if reason not in self.changed)


@contextmanager
def _watched(model: nn.Module, left: _Left, alone: bool) -> Iterator[None]:
    """Every call goes through its history first; the model's state is put back inside the trace.

    torch.export refuses a model whose attributes it finds changed.

    Args:
        left: added to.
        alone: there is no history. Of several calls nobody knows which one read what.
    """
    own = vars(model).get("forward")
    call = model.forward
    paths: list[str] = []

    def forward(ids: torch.Tensor, *earlier: torch.Tensor) -> Any:
        state = State(model)  # of the trace: torch.export has put its own tensors in place
        with _unnoticed():
            for other in earlier:
                with _nodes_kept(model):
                    call(other)
            result = call(ids)
        paths.extend(state.changes(attributes.overwritten() if alone else ()))
        state.restore()
        return result

    vars(model)["forward"] = forward
    state = State(model)
    try:
        with watch_attributes(model) as attributes:
            yield
        left.add(attributes.kept() if alone else attributes.changed.values())
        left.add(_as_reason(model, path) for path in paths)
        left.overwritten |= attributes.overwritten() if alone else {}
        left.read |= attributes.read
    finally:
        state.restore()
        del vars(model)["forward"]
        if own is not None:
            vars(model)["forward"] = own


@contextmanager
def _nodes_kept(model: nn.Module) -> Iterator[None]:
    """What a call gets back unchanged (``weight.float()``) keeps its node for the next call.

    Torch renames it, and the next call would be ``weight.float().float()``.
    """
    mode = get_proxy_mode()
    assert mode is not None
    tensors = (*model.parameters(), *model.buffers())
    slots = [(t, get_proxy_slot(t, mode.tracer, None)) for t in tensors]
    yield
    for tensor, slot in slots:
        if slot is not None:
            set_proxy_slot(tensor, mode.tracer, slot)


@contextmanager
def _unnoticed() -> Iterator[None]:
    """Buffers registered in forward are taken back: torch.export must not look for them."""
    hooks = torch.nn.modules.module._global_buffer_registration_hooks
    kept = hooks.copy()
    hooks.clear()
    try:
        yield
    finally:
        hooks.update(kept)


def _as_reason(model: nn.Module, path: str) -> Reason:
    return Reason(
        ReasonCode.MUTATED_STATE,
        f"forward changes `{path}`, so its result may depend on earlier calls",
        forward_line(model),
        hint="compute the value in __init__, or pass it through forward",
    )


def analysed_again(sample: Sample) -> Sample:
    """The same sample, after its graph was changed."""
    again = _analysed(
        sample.graph, sample.batch, sample.length, sample.logits, list(sample.changed)
    )
    return replace(again, unkept=sample.unkept, history=sample.history, paths=sample.paths)


def with_values(sample: Sample, frozen: Set[str]) -> Sample:
    """The same sample, to be compared: these parameters are constants that have their values."""
    inputs = [n for n in sample.graph.graph.nodes if n.op == "placeholder"]
    trained = [n for n in inputs if graph_input(n).kind is InputKind.PARAMETER]
    trained = [n for n in trained if graph_input(n).name not in frozen]
    learned = sample.memory.reaching(trained, sample.graph.graph)
    return replace(sample, learned=frozenset(learned), _values={})


def sample_of(
    gm: fx.GraphModule, batch: int, length: int, logits: str, unkept: tuple[str, ...]
) -> Sample:
    """The sample that a graph of plain sizes is, of a model that keeps nothing between calls."""
    make_whole(gm, batch, length)
    return replace(_analysed(gm, batch, length, logits, []), unkept=unkept)


def _written(graph: fx.Graph, memory: Memory, learned: Set[fx.Node]) -> list[fx.Node]:
    """Values made of parameters, in memory of their own, that forward writes to."""
    held = {memory.shared(n) for n in graph.nodes if n.op == "placeholder"}
    return [n for n in learned if memory.shared(n) not in held and memory.written_by(n)]


def _analysed(
    gm: fx.GraphModule, batch: int, length: int, logits: str, changed: list[Reason]
) -> Sample:
    memory = Memory(gm.graph)
    needed = memory.needed(gm.graph)
    inputs = [n for n in gm.graph.nodes if n.op == "placeholder"]
    given = [n for n in inputs if graph_input(n).kind is InputKind.DATA]
    if any(n in needed for n in given[1:]):
        raise PortError(changed)
    learned = memory.reaching(
        [n for n in inputs if graph_input(n).kind is InputKind.PARAMETER], gm.graph
    )
    data = memory.reaching(given, gm.graph)
    data |= memory.reaching(_written(gm.graph, memory, learned), gm.graph)
    output = next(n for n in gm.graph.nodes if n.op == "output")
    return Sample(
        batch=batch,
        length=length,
        graph=gm,
        tokens=given[0],
        output=output,
        memory=memory,
        needed=frozenset(needed),
        data=frozenset(data),
        learned=frozenset(learned),
        varying=tuple(n for n in gm.graph.nodes if n in data and n in needed),
        logits=logits,
        changed=tuple(changed),
    )
