"""Tokens sorted by their expert: what treats each on its own is ported, twins are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import fxport
from fxport.backends.torch import PackedModel
from fxport.capture.experts.tokens import slots_of_each_token
from fxport.capture.export import capture
from fxport.capture.run_lengths import NumbersTaken, run_between, run_lengths
from fxport.errors import PortError
from fxport.passes.serving import lower_for_serving
from tests.zoo.awkward import LAYERS, LIMIT, VOCAB, WIDTH
from tests.zoo.experts import decoder
from tests.zoo.sorted_experts import (
    ELSEWHERE,
    EXACT,
    MIXING,
    Parallel,
    experts_counted_first,
    numbered_experts,
    sorted_experts,
)


@pytest.mark.parametrize(
    ("made", "lifted"),
    [(sorted_experts, LAYERS), (numbered_experts, 2), (experts_counted_first, 2)],
)
def test_the_port_is_the_model(made: Callable[[], nn.Module], lifted: int) -> None:
    """Two sequences packed, in float64; one token leaves experts empty."""
    torch.manual_seed(3)
    model = made().double().eval()
    port = fxport.port(model, max_seq_len=LIMIT)
    alone = {d.module for d in port.report.decisions if d.pass_name == "experts"}
    assert len(alone) == lifted, alone  # of these no expert runs on every slot
    packed = PackedModel(port.serving, port.parameters)
    for length in (1, 2, 5, 37, LIMIT):
        sequences = [torch.randint(0, VOCAB, (n,)) for n in (length, 11)]
        for sequence, found in zip(sequences, packed(sequences), strict=True):
            with torch.no_grad():
                expected = model(sequence[None])[0]
            assert (found - expected).abs().max() < 1e-12


def test_rows_are_computed_on_together_between_two_products() -> None:
    torch.manual_seed(3)
    model = decoder(Parallel, layers=1).double().eval()
    port = fxport.port(model)
    packed = PackedModel(port.serving, port.parameters)
    for length in (1, 37):
        sequence = torch.randint(0, VOCAB, (length,))
        with torch.no_grad():
            expected = model(sequence[None])[0]
        assert (packed([sequence])[0] - expected).abs().max() < 1e-12


@pytest.mark.parametrize("name", MIXING)
def test_twins_are_refused(name: str) -> None:
    """At the line that mixes tokens, or that takes what nobody can know."""
    with pytest.raises(PortError) as refused:
        lower_for_serving(capture(decoder(MIXING[name], layers=1).eval()), None)
    lines = [reason.location.source for reason in refused.value.reasons if reason.location]
    assert any(line.endswith(ELSEWHERE.get(name, "# refused")) for line in lines), lines


@pytest.mark.parametrize("made", [*EXACT.values(), *MIXING.values()])
def test_models_run(made: Callable[[], nn.Module]) -> None:
    """A twin that is no model proves nothing."""
    torch.manual_seed(3)
    block = made()
    with torch.no_grad():
        assert block(torch.randn(2, 37, WIDTH)).shape == (2, 37, WIDTH)


@pytest.mark.parametrize(
    ("numbers", "each"),
    [
        (lambda n: torch.arange(n).repeat_interleave(3), 3),
        (lambda n: torch.arange(n).long()[:, None].expand(-1, 3).reshape(-1), 3),
        (lambda n: torch.arange(n).unsqueeze(-1).repeat(1, 3).flatten(), 3),
        (lambda n: torch.arange(0, 3 * n, 1) // 3, 3),
        (lambda n: torch.arange(n).repeat(3), None),
        (lambda n: torch.arange(n)[:, None].repeat(3, 1).flatten(), None),
        (lambda n: torch.arange(n)[None].expand(3, -1).reshape(-1), None),
        (lambda n: torch.arange(1, n).repeat_interleave(3), None),
        (lambda n: torch.arange(0, 2 * n, 2).repeat_interleave(3), None),
        (lambda n: torch.arange(n).to(torch.int8).repeat_interleave(3), None),
        (lambda n: torch.arange(n).float() / 3, None),
        (lambda n: torch.arange(-n, n) // 3, None),
    ],
)
def test_which_numbers_are_those_of_the_tokens(
    numbers: Callable[[int], Tensor], each: int | None
) -> None:
    traced = make_fx(lambda x: numbers(x.shape[0]), tracing_mode="fake", pre_dispatch=True)
    graph = traced(torch.zeros(7)).graph
    (made,) = graph.find_nodes(op="output")[0].all_input_nodes
    assert slots_of_each_token(made) == each
    if each is not None:
        assert numbers(7).tolist() == [i // each for i in range(7 * each)]


def _lengths(*empty: bool) -> tuple[Any, ...]:
    return run_lengths(empty, 30, "one")


def test_sums_of_run_lengths() -> None:
    one, two, three = _lengths(False, False, False)
    assert one + two + three == 30
    assert 30 - (one + two) - three == 0
    assert (one + two > one) and (one != one + two) and one != 0
    assert run_between(one, one + two, (one, two, three)) == 1
    assert run_between(one + two, 30, (one, two, three)) == 2
    assert run_between(0, one + two, (one, two, three)) is None


def test_run_lengths_of_another_order_say_nothing() -> None:
    mine = _lengths(False, False)
    other = run_lengths([False, False], 30, "other")
    assert run_between(other[0], other[0] + other[1], mine) is None
    assert run_between(0, other[0], mine) is None
    for ask in (lambda: mine[0] == other[0], lambda: mine[0] + other[1]):
        with pytest.raises(NumbersTaken):
            ask()


@pytest.mark.parametrize(
    "ask",
    [
        lambda n: n[0] > n[1],
        lambda n: n[0] > 1,
        lambda n: n[0] == 5,
        lambda n: n[0] + 1,
        lambda n: n[0] * 2,
        lambda n: n[0] / 2,
        lambda n: n[0] // 2,
        lambda n: -n[0],
        lambda n: int(n[0]),
        lambda n: [1][n[0]],
        lambda n: range(n[0]),
        lambda n: {n[0]},
        lambda n: f"{n[0]}",
        lambda n: n[0] * Tensor([1.0]),
    ],
)
def test_what_run_lengths_do_not_tell_is_not_answered(ask: Any) -> None:
    with pytest.raises(NumbersTaken):
        ask(_lengths(False, True, False)[::2])
