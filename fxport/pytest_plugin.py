"""The pytest plugin: ``pytest --fxport-accept`` writes golden files instead of comparing.

Loaded in every pytest run of an environment that has fxport, so it imports nothing heavy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest

__all__ = ["accepting"]

_FLAG = "--fxport-accept"
_accept = False


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fxport")
    group.addoption(
        _FLAG, action="store_true", help="write the golden graphs that fxport.testing compares with"
    )


def pytest_configure(config: pytest.Config) -> None:
    global _accept
    _accept = bool(config.getoption(_FLAG))


def accepting() -> bool:
    """Whether the run was started with ``--fxport-accept``."""
    return _accept
