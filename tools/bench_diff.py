"""What recording costs: `fxport.port` with and without its stages, and the size of the page.

    python -m fxport.tools.bench_diff --layers 12 --rounds 3

Both are run in turns and their medians compared, in seconds of processor time. ``share`` is the
time spent in copies of graphs and pairing of nodes, as a part of the port's.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import fxport
from fxport.diff.record import GraphDiff
from fxport.diff.stages import Recorder, Stage
from fxport.passes import serving

VOCABULARY, HIDDEN, HEADS, LENGTH = 67, 64, 2, 40


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(HIDDEN) for _ in range(2))
        self.qkv, self.out = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.up, self.down = nn.Linear(HIDDEN, 4 * HIDDEN), nn.Linear(4 * HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        split = self.qkv(self.norms[0](x)).split(C, dim=-1)
        q, k, v = (t.view(B, T, HEADS, C // HEADS).transpose(1, 2) for t in split)
        scores = q @ k.transpose(-2, -1) * (C // HEADS) ** -0.5
        hidden = torch.ones(T, T, device=x.device).triu(1).bool()
        y = scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v
        x = x + self.out(y.transpose(1, 2).reshape(B, T, C))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class GPT(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCABULARY, HIDDEN), nn.Embedding(LENGTH, HIDDEN)
        self.h = nn.ModuleList(Block() for _ in range(layers))
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.h:
            x = block(x)
        return self.head(x)


class _Silent(Recorder):
    """Runs the passes unwatched."""

    @contextmanager
    def stage(self, name: str) -> Iterator[GraphDiff]:
        yield GraphDiff(fx.GraphModule({}, fx.Graph()), name)


class _Timed(Recorder):
    """Adds up the time between the stages' ends and the passes'."""

    spent = 0.0

    @contextmanager
    def stage(self, name: str) -> Iterator[GraphDiff]:
        began = time.process_time()
        with super().stage(name) as diff:
            entered = time.process_time()
            yield diff
            left = time.process_time()
        _Timed.spent += entered - began + time.process_time() - left


def timed_port(layers: int, recorder: type[Recorder]) -> tuple[float, tuple[Stage, ...]]:
    """Seconds of processor time of one port, and its stages."""
    torch.manual_seed(0)
    model = GPT(layers)
    original = serving.Recorder
    serving.Recorder = recorder  # type: ignore[misc]
    began = time.process_time()
    try:
        port = fxport.port(model)
    finally:
        serving.Recorder = original  # type: ignore[misc]
    return time.process_time() - began, port.stages


def largest_page(stages: tuple[Stage, ...]) -> int:
    """Bytes of the largest page of the stages."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "diff.html")
        sizes = []
        for stage in stages:
            stage.diff.to_html(path)
            sizes.append(path.stat().st_size)
    return max(sizes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[12, 48])
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    timed_port(2, _Silent)  # imports and first calls
    for layers in given.layers:
        without, recorded = [], []
        stages: tuple[Stage, ...] = ()
        _Timed.spent = 0.0
        for _ in range(given.rounds):
            without.append(timed_port(layers, _Silent)[0])
            seconds, stages = timed_port(layers, _Timed)
            recorded.append(seconds)
        one, other = statistics.median(without), statistics.median(recorded)
        share = _Timed.spent / sum(recorded)
        print(
            f"{layers} layers: {one:.2f} s without, {other:.2f} s recorded: "
            f"{other / one - 1:+.1%}, share {share:.1%}; "
            f"largest page {largest_page(stages) / 1e6:.2f} MB",
            flush=True,
        )


if __name__ == "__main__":
    main()
