"""Capture: limits, history, outputs, and refusals with the user's line."""

from __future__ import annotations

import linecache
import logging
import sys
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxport.capture.export import capture
from fxport.capture.inputs import InputKind, graph_input
from fxport.errors import PortError, ReasonCode
from fxport.passes.functional import functionalise
from tests.zoo.gpt import GPT
from tests.zoo.llama import Llama

V, C = 43, 16


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(V, C)
        self.out = nn.Linear(C, V)

    def forward(self, ids):
        return self.out(self.emb(ids))


def test_limit_is_inclusive_and_found_from_assertion_and_buffers():
    assert capture(GPT(block_size=160)).limit == 160
    assert capture(Llama(max_seq_len=144)).limit == 144


def test_a_limit_shorter_than_the_usual_trace_length():
    assert capture(GPT(block_size=16)).limit == 16


def test_inputs_know_their_names_and_ties():
    captured = capture(GPT())
    kinds = [graph_input(n).kind for n in captured.graph.graph.find_nodes(op="placeholder")]
    assert kinds.count(InputKind.DATA) == 1
    assert captured.aliases == {"lm_head.weight": "transformer.wte.weight"}
    assert set(captured.parameters) <= {n for n, _ in GPT().named_parameters()}


def test_the_model_is_left_as_it_was():
    model = GPT().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    attributes = dict(vars(model))
    capture(model)
    assert model.training and all(m.training for m in model.modules())
    assert vars(model) == attributes
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@dataclass
class Output:
    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None


torch.export.register_dataclass(Output, serialized_type_name="tests.Output")


@pytest.mark.parametrize("shape", ["tuple", "dict", "dataclass", "hidden_too", "last_select"])
def test_logits_are_found_in_the_output(shape):
    class Model(Tiny):
        def forward(self, ids, targets=None):
            hidden = self.emb(ids)
            logits = self.out(hidden)
            return {
                "tuple": (logits, None),
                "dict": {"logits": logits, "cache": None},
                "dataclass": Output(logits=logits),
                "hidden_too": (hidden, logits),
                "last_select": logits[:, -1],
            }[shape]

    captured = capture(Model())
    output = next(n for n in captured.graph.graph.nodes if n.op == "output")
    assert output.args[0].meta["val"].shape[-1] == V


def refusal(model: nn.Module) -> object:
    with pytest.raises(PortError) as caught:
        capture(model)
    return caught.value.reasons[0]


def line_of(reason) -> str:
    assert reason.location is not None, str(reason)
    assert reason.location.file == __file__, str(reason)
    return linecache.getline(__file__, reason.location.line)


def test_data_dependent_control_flow_is_refused_at_its_line(capfd, caplog):
    class Model(Tiny):
        def forward(self, ids):
            print("the user's own", file=sys.stderr)
            if ids.sum() > 3:  # HERE
                return super().forward(ids)
            return super().forward(ids) * 2

    reason = refusal(Model())
    assert reason.code is ReasonCode.CAPTURE_FAILED
    assert "# HERE" in line_of(reason), str(reason)
    assert "other values of a tensor" in reason.message and "control flow" in reason.hint
    printed, complaints = capfd.readouterr()  # torch would print the graph, the user may print
    assert not printed and set(complaints.splitlines()) == {"the user's own"}
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def test_an_attribute_changed_in_forward_is_refused_at_its_line():
    class Model(Tiny):
        def __init__(self):
            super().__init__()
            self.calls = 0

        def forward(self, ids):
            self.calls += 1  # HERE
            return super().forward(ids) * self.calls

    reason = refusal(Model())
    assert reason.code is ReasonCode.MUTATED_STATE
    assert "# HERE" in line_of(reason)


def test_a_buffer_written_in_forward_is_refused():
    class Model(Tiny):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, ids):
            self.count.add_(1)  # HERE
            return super().forward(ids) * self.count

    with pytest.raises(PortError) as caught:
        functionalise(capture(Model()).graph)
    reason = caught.value.reasons[0]
    assert reason.code is ReasonCode.MUTATED_STATE
    assert "# HERE" in line_of(reason)


def test_several_required_arguments_are_refused():
    class Model(Tiny):
        def forward(self, ids, mask):
            return super().forward(ids) * mask

    assert "mask" in refusal(Model()).message


def test_another_path_for_short_sequences_is_refused_at_its_line():
    class Model(Tiny):
        def forward(self, ids):
            x = super().forward(ids)
            return x if ids.shape[1] > 4 else x * 2  # HERE

    reason = refusal(Model())
    assert reason.code is ReasonCode.DEPENDS_ON_LENGTH
    assert "# HERE" in line_of(reason)


def test_an_error_of_the_model_itself_names_its_line():
    class Model(Tiny):
        def forward(self, ids):
            return self.out(F.relu(self.emb(ids)) @ torch.ones(C, 3))  # HERE

    assert "# HERE" in line_of(refusal(Model()))
