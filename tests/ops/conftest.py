"""What several tests of the op need."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fxport.ops import plans


@pytest.fixture
def nothing_judged() -> Iterator[None]:
    """For tests that change what the judgement of a call rests on."""
    plans._judge.cache_clear()
    yield
    plans._judge.cache_clear()
