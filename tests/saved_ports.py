"""Saved ports changed on purpose, under a digest that fits: more than the digest is tested."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["edit", "write_graph"]


def write_graph(directory: Path, text: str) -> None:
    """Puts `text` in the place of the graph, and makes config.json agree."""
    file, config = directory / "fxport_graph.json", directory / "config.json"
    file.write_text(text)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    config.write_text(json.dumps({**json.loads(config.read_text()), "fxport_graph_sha256": digest}))


def edit(directory: Path, change: Callable[[Any], object]) -> None:
    """Changes the graph's record in place."""
    graph = json.loads((directory / "fxport_graph.json").read_text())
    change(graph)
    write_graph(directory, json.dumps(graph))
