"""Models that mix tokens without attention are refused at the line that does it."""

from __future__ import annotations

import inspect

import pytest

import fxport
from fxport.errors import PortError
from tests.zoo.mixing import REFUSED


@pytest.mark.parametrize("name", REFUSED)
def test_refused_at_the_line_that_mixes(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    make, code, mixer = REFUSED[name]
    with pytest.raises(PortError) as refused:
        fxport.port(make().eval())
    first = refused.value.reasons[0]
    assert first.code is code
    lines, start = inspect.getsourcelines(mixer.forward)
    assert first.location is not None
    assert start <= first.location.line < start + len(lines)
    assert first.location.file.endswith("mixing.py")
    assert "Traceback" not in capfd.readouterr().err  # torch's own log of it
