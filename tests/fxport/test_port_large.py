"""Models too large for this machine's memory, and what a port of them costs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fxport
from fxport.errors import FxportError, PortError, ReasonCode
from fxport.graph_json import part_to_dict
from fxport.passes.tokens.rules import has_rule
from fxport.report import Outcome
from tests.zoo.gpt import GPT
from tests.zoo.llama import Llama


def without_values(model: nn.Module) -> nn.Module:
    """Parameters on the meta device, ties kept; buffers stay."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                empty = nn.Parameter(parameter.detach().to("meta"))
                module._parameters[name] = made.setdefault(id(parameter), empty)
    return model


@pytest.mark.parametrize("build", [GPT, Llama, lambda: GPT().bfloat16()])
def test_a_port_without_values_is_the_port_with_values(build):
    real, meta = fxport.port(build()), fxport.port(without_values(build()))
    assert all(p.is_meta for p in meta.parameters.values())
    assert {n: p.shape for n, p in meta.parameters.items()} == {
        n: p.shape for n, p in real.parameters.items()
    }
    assert (real.half is None) == (meta.half is None)
    for one, other in ((real.serving, meta.serving), (real.half, meta.half)):
        if one is None or other is None:
            continue
        assert one.attention == other.attention and one.aliases == other.aliases
        for part in ("embed", "body", "head"):
            dicts = [part_to_dict(getattr(s, part), has_rule, s.dtype) for s in (one, other)]
            assert dicts[0] == dicts[1]


def test_that_nothing_was_compared_is_said(tmp_path: Path):
    port = fxport.port(without_values(GPT()))
    (check,) = [d for d in port.report.decisions if d.pass_name == "self-check"]
    assert check.outcome is Outcome.LEFT and check.reason is not None
    assert "meta device" in check.reason.message
    with pytest.raises(FxportError, match="has no data"):
        port.save(tmp_path / "port")
    assert list(tmp_path.iterdir()) == []


def test_buffers_without_values_are_refused_by_name():
    with torch.device("meta"):
        model = Llama(complex_rope=False)
    with pytest.raises(PortError) as refused:
        fxport.port(model)
    reasons = refused.value.reasons
    assert {r.code for r in reasons} == {ReasonCode.CAPTURE_FAILED}
    assert ["`cos`" in reasons[0].message, "`sin`" in reasons[1].message] == [True, True]


_GROWTH = """
import json, sys, torch
from pathlib import Path
from fxport.saved import _write_weights
tensors = {f"layer.{i}": torch.ones(8, 2**20) for i in range(8)}  # 32 MiB each
tensors["view"] = tensors["layer.0"][:, :3]
tensors["angles"] = torch.polar(torch.ones(5), torch.arange(5.0))
_write_weights(Path(sys.argv[1]), {"warm": torch.ones(3)})
def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**10
Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident
before = peak()
_write_weights(Path(sys.argv[1]), tensors)
print(json.dumps(peak() - before))
"""
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@on_linux
def test_saving_copies_no_weights(tmp_path: Path):
    """256 MiB of weights: the process grows by less than a fifth of that."""
    run = subprocess.run(
        [sys.executable, "-c", _GROWTH, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert json.loads(run.stdout.splitlines()[-1]) < 0.2 * 256
    stored = load_file(tmp_path / "model-00001-of-00001.safetensors")
    assert stored["view"].shape == (8, 3) and stored["angles"].shape == (5, 2)


@on_linux
def test_the_memory_check_would_see_a_copy(tmp_path: Path):
    copying = _GROWTH.replace(
        "_write_weights(Path(sys.argv[1]), tensors)",
        "_write_weights(Path(sys.argv[1]), {n: t.clone() for n, t in tensors.items()})",
    )
    assert copying != _GROWTH
    run = subprocess.run(
        [sys.executable, "-c", copying, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert json.loads(run.stdout.splitlines()[-1]) > 0.8 * 256


def test_tied_and_shared_tensors_round_trip(tmp_path: Path):
    base = torch.randn(6, 4)
    from fxport.saved import _write_weights

    _write_weights(tmp_path, {"a": base, "b": base, "c": base.t(), "d": base[1:3]})
    stored = load_file(tmp_path / "model-00001-of-00001.safetensors")
    for name, expected in {"a": base, "b": base, "c": base.t(), "d": base[1:3]}.items():
        assert torch.equal(stored[name], expected)
    save_file(stored, tmp_path / "again.safetensors")  # nothing shares memory any more
