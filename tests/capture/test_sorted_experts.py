"""Tokens sorted by their expert: what treats each on its own is ported, twins are refused."""

from __future__ import annotations

import pytest
import torch

import fxport
from fxport.backends.torch import PackedModel
from fxport.capture.export import capture
from fxport.capture.run_lengths import NumbersTaken, run_between, run_lengths
from fxport.errors import PortError
from fxport.passes.serving import lower_for_serving
from tests.zoo.awkward import LIMIT, VOCAB
from tests.zoo.experts import decoder
from tests.zoo.sorted_experts import MIXING, sorted_experts


def test_the_port_is_the_model() -> None:
    """Two sequences packed, in float64; one token leaves experts empty."""
    torch.manual_seed(3)
    model = sorted_experts().double().eval()
    port = fxport.port(model)
    packed = PackedModel(port.serving, port.parameters)
    for length in (1, 2, 5, 37, LIMIT):
        sequences = [torch.randint(0, VOCAB, (n,)) for n in (length, 11)]
        for sequence, found in zip(sequences, packed(sequences), strict=True):
            with torch.no_grad():
                expected = model(sequence[None])[0]
            assert (found - expected).abs().max() < 1e-12


@pytest.mark.parametrize("name", MIXING)
def test_twins_are_refused(name: str) -> None:
    with pytest.raises(PortError):
        lower_for_serving(capture(decoder(MIXING[name], layers=1).eval()), None)


def test_sums_of_run_lengths() -> None:
    one, two, three = run_lengths([False, False, False], 30)
    assert one + two + three == 30
    assert 30 - (one + two) - three == 0
    assert (one + two > one) and (one != one + two) and one != 0
    assert run_between(one, one + two, (one, two, three)) == 1
    assert run_between(one + two, 30, (one, two, three)) == 2
    assert run_between(0, one + two, (one, two, three)) is None


@pytest.mark.parametrize(
    "ask",
    [
        lambda n: n[0] > n[1],
        lambda n: n[0] > 1,
        lambda n: n[0] == 5,
        lambda n: int(n[0]),
        lambda n: [1][n[0]],
        lambda n: range(n[0]),
        lambda n: {n[0]},
        lambda n: f"{n[0]}",
    ],
)
def test_what_run_lengths_do_not_tell_is_not_answered(ask: object) -> None:
    with pytest.raises(NumbersTaken):
        ask(run_lengths([False, True, False], 30)[::2])  # type: ignore[operator]
