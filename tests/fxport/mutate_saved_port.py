"""Run by test_load: mutates the files of a small port and loads each; prints counts as JSON."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fxport
from fxport.errors import SavedPortError

BANNED = {"import", "exec", "compile", "subprocess.Popen", "os.system", "os.exec", "os.fork",
          "os.posix_spawn", "pickle.find_class", "marshal.loads", "ctypes.dlopen", "os.remove",
          "os.rename", "os.mkdir", "shutil.rmtree"}  # fmt: skip
VALUES: list[Any] = [None, True, -1, 0, 2**31, 2**63, -(2**63), 1e308, "", "x", [], {}, [[]],
          {"node": "x"}, {"float": "nan"}, "../../etc/passwd", "aten.system.default",
          "operator.getitem",
          {"dtype": "object"}, "__class__", "a" * 5000, 10**30, [1] * 300]  # fmt: skip

watching = False
events: list[str] = []


def audit(event: str, given: tuple[Any, ...]) -> None:
    if not watching:
        return
    writes = event == "open" and isinstance(given[1], str) and set(given[1]) & set("wax+")
    if event in BANNED or event.startswith("socket.") or writes:
        events.append(f"{event} {given}"[:300])


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(11, 8)
        self.qkv = nn.ModuleList(nn.Linear(8, 24) for _ in range(2))
        angles = torch.arange(20.0)[:, None] / torch.arange(1.0, 3.0)
        self.register_buffer("turn", torch.polar(torch.ones_like(angles), angles))
        self.head = nn.Linear(8, 11, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        b, t = tokens.shape
        x = self.wte(tokens)
        turn = self.turn[:t]
        for layer in self.qkv:
            q, k, v = layer(x).view(b, t, 3, 2, 4).permute(2, 0, 3, 1, 4)
            q, k = (_turned(y, turn) for y in (q, k))
            y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + y.transpose(1, 2).reshape(b, t, 8)
        return self.head(x)


def _turned(x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], 2, 2))
    return torch.view_as_real(pairs * turn).flatten(-2)


def mutated(data: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(data))
    kind = draw.randrange(6)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + bytes([draw.randrange(256)]) + data[at + 1 :]
    if kind == 2:
        return data[:at] + data[at + draw.randrange(1, 60) :]
    if kind == 3:
        return data[:at] + data[at : at + 40] + data[at:]
    if kind == 4:
        return data[:at] + draw.randbytes(draw.randrange(1, 30)) + data[at:]
    return bytes([data[0] ^ (1 << draw.randrange(8))]) + data[1:]


def changed(record: Any, draw: random.Random) -> None:
    """Another value somewhere in a JSON record."""
    holder = record
    while True:
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        key = draw.choice(keys)
        inner = holder[key]
        if isinstance(inner, dict | list) and inner and draw.random() < 0.85:
            holder = inner
            continue
        if isinstance(holder, dict) and draw.random() < 0.2:
            del holder[key]
        elif isinstance(holder, list) and draw.random() < 0.3:
            draw.shuffle(holder)
        else:
            holder[key] = draw.choice(VALUES)
        return


def damage(directory: Path, draw: random.Random) -> None:
    graph, config = directory / "fxport_graph.json", directory / "config.json"
    weights = next(directory.glob("*.safetensors"))
    kind = draw.randrange(5)
    if kind < 2:  # a graph that says something else, under a digest that fits
        record = json.loads(graph.read_text())
        for _ in range(draw.randrange(1, 4)):
            changed(record, draw)
        graph.write_text(json.dumps(record))
    elif kind == 2:
        graph.write_bytes(mutated(graph.read_bytes(), draw))
    elif kind == 3:
        weights.write_bytes(mutated(weights.read_bytes(), draw))
    else:
        config.write_bytes(mutated(config.read_bytes(), draw))
    if kind < 2 or (kind == 2 and draw.random() < 0.5):
        record = json.loads(config.read_text())
        record["fxport_graph_sha256"] = hashlib.sha256(graph.read_bytes()).hexdigest()
        config.write_text(json.dumps(record))


def main(work: Path, count: int) -> None:
    global watching
    sys.addaudithook(audit)
    port = fxport.port(Tiny()).save(work / "port")
    fxport.load(port)  # everything that is imported on the way
    (work / "broken").mkdir()
    counts: dict[str, Any] = {"read": 0, "refused": 0, "others": []}
    watching = True
    eval("1 + 1")
    seen = bool(events)
    events.clear()
    for number in range(count):
        draw = random.Random(number)
        watching = False
        copy = work / "broken" / "port"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(port, copy)
        damage(copy, draw)
        watching = True
        try:
            loaded = fxport.load(copy)
            counts["read"] += 1
            assert all(not t.is_meta for t in loaded.serving.constants.values())
            assert loaded.parameters.keys() == loaded.serving.parameters.keys()
        except SavedPortError:
            counts["refused"] += 1
        except Exception as error:
            counts["others"].append(f"{number}: {error!r}"[:300])
    watching = False
    print(json.dumps({**counts, "events": events[:20], "seen by the hook": seen}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
