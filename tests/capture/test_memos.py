"""What functions and globals remember: no trace leaves anything there."""

from __future__ import annotations

import sys
import types
from typing import ClassVar

import pytest
import torch
from torch import nn

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
        for known in (remembered.KNOWN, remembered.OfItsClass.known, remembered.Tables.known):
            assert all(type(mask) is torch.Tensor for mask in known.values())
        assert type(remembered.OfItsClass.latest) in (torch.Tensor, type(None))
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


def test_attributes_of_classes_are_put_back():
    model = remembered.EXACT["a dictionary of the class"]()
    layer = remembered.OfItsClass
    kept = layer.known[5] = torch.ones(5, 5)
    layer.latest = kept
    with nothing_remembered(model):
        layer.known[5], layer.known[6] = torch.zeros(5, 5), torch.zeros(6, 6)
        layer.latest, layer.count = None, 1
    assert layer.known.pop(5) is kept and 6 not in layer.known
    assert layer.latest is kept and not hasattr(layer, "count")
    layer.latest = None


def test_a_class_of_a_function_is_one_of_the_models():
    class Local(nn.Module):
        known: ClassVar[dict[int, int]] = {}

    with nothing_remembered(nn.Sequential(Local())):
        Local.known[1] = 1
    assert not Local.known


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
