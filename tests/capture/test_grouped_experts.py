"""Sorted tokens computed on together: row by row is ported, twins are refused."""

from __future__ import annotations

import pytest
import torch

from fxport.backends.torch import PackedModel
from fxport.capture.export import capture
from fxport.errors import PortError
from fxport.passes.serving import lower_for_serving
from tests.zoo.awkward import LIMIT, VOCAB, WIDTH
from tests.zoo.experts import Routed, decoder
from tests.zoo.grouped_experts import (
    MARKED,
    MIXING,
    Grouped,
    Inverse,
    InverseScattered,
    LookedUp,
    Owners,
    Starts,
    StartsByDifference,
    StartsPadded,
)


@pytest.mark.parametrize(
    ("styles", "dtype", "bound"),
    [
        ((Owners, LookedUp, Starts, StartsByDifference), torch.float64, 1e-12),
        # eager grouped products take no float64
        ((Grouped, Inverse, InverseScattered, StartsPadded), torch.float32, 2e-5),
    ],
)
def test_the_port_is_the_model(
    styles: tuple[type[Routed], ...], dtype: torch.dtype, bound: float
) -> None:
    """One token leaves experts empty."""
    torch.manual_seed(3)
    made = iter(styles)
    model = decoder(lambda: next(made)(), layers=len(styles)).to(dtype).eval()
    lowered = lower_for_serving(capture(model), LIMIT)
    experts = [d for d in lowered.decisions if d.pass_name == "experts"]
    assert len({d.location for d in experts}) >= len(styles)
    body = lowered.serving.body.graph
    assert not body.find_nodes(op="call_function", target=torch.ops.aten.bmm.default)
    assert not any(d.pass_name == "attention" and d.reason for d in lowered.decisions)
    packed = PackedModel(lowered.serving, dict(model.named_parameters()))
    for length in (1, 2, 37, LIMIT):
        sequences = [torch.randint(0, VOCAB, (n,)) for n in (length, 11)]
        for sequence, found in zip(sequences, packed(sequences), strict=True):
            with torch.no_grad():
                expected = model(sequence[None])[0]
            assert (found - expected).abs().max() < bound


@pytest.mark.parametrize("name", MIXING)
def test_twins_are_refused(name: str) -> None:
    with pytest.raises(PortError) as refused:
        lower_for_serving(capture(decoder(MIXING[name], layers=1).eval()), None)
    lines = [reason.location.source for reason in refused.value.reasons if reason.location]
    assert lines
    if name in MARKED:
        assert any(line.endswith("# refused") for line in lines), lines


@pytest.mark.parametrize("made", MIXING.values())
def test_twins_run(made: type[Routed]) -> None:
    """A twin that is no model proves nothing."""
    torch.manual_seed(3)
    with torch.no_grad():
        assert made()(torch.randn(2, 37, WIDTH)).shape == (2, 37, WIDTH)
