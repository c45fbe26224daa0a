"""What several tests of the op need."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fxport.ops import flash3_package, flash4, plans


@pytest.fixture
def nothing_judged() -> Iterator[None]:
    """For tests that change what the judgement of a call rests on."""
    plans._judge.cache_clear()
    yield
    plans._judge.cache_clear()


@pytest.fixture
def without_packages(nothing_judged: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that name the kernels that run: one package more would change the choice."""
    for library in (flash3_package, flash4):
        monkeypatch.setattr(library, "_not_installed", lambda: "left out for this test")
