"""What functions and globals remember: no trace leaves anything there."""

from __future__ import annotations

import sys
import types

import pytest
import torch

import fxport
from fxport.backends.torch import PackedModel
from fxport.capture.memos import nothing_remembered
from tests.zoo import remembered
from tests.zoo.awkward import VOCAB


@pytest.mark.parametrize("name", remembered.EXACT)
def test_a_memory_beside_the_model_is_exact_and_left_alone(name):
    """Torch's stand-ins stayed in it: the port failed, and the model itself from then on."""
    torch.manual_seed(3)
    model = remembered.EXACT[name]().double().eval()
    ids = torch.randint(0, VOCAB, (13,))
    with torch.no_grad():
        before = model(ids[None])[0]
        port = fxport.port(model)
        assert all(type(mask) is torch.Tensor for mask in remembered.KNOWN.values())
        assert torch.equal(model(ids[None])[0], before)
    (found,) = PackedModel(port.serving, port.parameters)([ids])
    torch.testing.assert_close(found, before, rtol=0.0, atol=1e-12)


def test_globals_are_put_back_and_memories_emptied():
    model = remembered.EXACT["a function with a memory"]()
    remembered.memo(3)
    kept = remembered.KNOWN[5] = torch.ones(5, 5)
    with nothing_remembered(model):
        assert remembered.memo.cache_info().currsize == 0
        remembered.memo(4)
        remembered.KNOWN[5] = torch.zeros(5, 5)
        remembered.KNOWN[6] = torch.zeros(6, 6)
        remembered.NEW = 1
    assert remembered.memo.cache_info().currsize == 0
    assert remembered.KNOWN.pop(5) is kept and 6 not in remembered.KNOWN
    assert not hasattr(remembered, "NEW")


def test_what_is_imported_in_a_trace_stays_imported(monkeypatch):
    monkeypatch.setattr(remembered, "LOADED", sys.modules, raising=False)
    monkeypatch.delitem(sys.modules, "loaded_in_a_trace", raising=False)
    with nothing_remembered(remembered.EXACT["a function with a memory"]()):
        sys.modules["loaded_in_a_trace"] = types.ModuleType("loaded_in_a_trace")
    assert "loaded_in_a_trace" in sys.modules
    del sys.modules["loaded_in_a_trace"]


class Missing(type):
    """What a library that is not installed is replaced by."""

    def __getattr__(cls, name):
        raise ImportError(name)


def test_what_raises_whatever_it_is_asked_is_left_alone(monkeypatch):
    monkeypatch.setattr(remembered, "MISSING", Missing("absent", (), {}), raising=False)
    with nothing_remembered(remembered.EXACT["a function with a memory"]()):
        assert remembered.memo.cache_info().currsize == 0
