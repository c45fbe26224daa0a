"""What torch asks of its tensors goes past our modes, and nothing else does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fxport.capture import location, rephrase
from fxport.capture.clone import clone_for_capture
from fxport.capture.gradients import watch_gradients
from fxport.capture.metadata import METADATA
from fxport.capture.rephrase import rephrased
from fxport.capture.trace import export
from tests.zoo.called import Tiny

NOTHING: frozenset[Any] = frozenset()


@pytest.mark.parametrize("dynamic", [None, {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}])
def test_the_nodes_carry_what_they_carried(dynamic: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def nodes() -> list[tuple[str, str, Any]]:
        clone = clone_for_capture(Tiny())
        ids = torch.zeros(2, 37, dtype=torch.long)
        with watch_gradients(clone):
            graph = export(clone, (ids,), dynamic and {"ids": dynamic}).graph
        return [(n.name, str(n.target), n.meta.get("custom")) for n in graph.nodes]

    found = nodes()
    for file in (location, rephrase):
        monkeypatch.setattr(file, "METADATA", NOTHING)
    assert found == nodes()
    assert any(custom for *_, custom in found)


class Own(Tensor):
    """Says another size."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.size:
            return "its own"
        return super().__torch_function__(func, types, args, kwargs)


def test_a_class_of_tensors_answers_for_itself() -> None:
    with rephrased():
        assert torch.zeros(3).as_subclass(Own).size() == "its own"
        assert torch.zeros(3).size() == (3,)


def test_what_a_mode_looks_at_is_none_of_it() -> None:
    looked_at = {Tensor.data, Tensor.requires_grad, Tensor.is_leaf, Tensor.device, Tensor.is_meta}
    assert not METADATA & {own.__get__ for own in looked_at}  # type: ignore[attr-defined]
