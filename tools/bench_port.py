"""How long a port takes, by depth: an 8B-parameter Llama shape without weights.

    python -m fxport.tools.bench_port --layers 8,16,32,64

Parameters are on the meta device and bfloat16; every depth runs in a process of its own, since
the peak of a process never falls. The time is that of `fxport.port` alone.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time

import click
import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn

import fxport


class _Norm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-5)).type_as(x) * self.weight


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, kv_heads: int, hidden: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size = heads, kv_heads, width // heads
        self.wq = nn.Linear(width, width, bias=False)
        self.wk = nn.Linear(width, kv_heads * self.size, bias=False)
        self.wv = nn.Linear(width, kv_heads * self.size, bias=False)
        self.wo = nn.Linear(width, width, bias=False)
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)
        self.attention_norm, self.ffn_norm = _Norm(width), _Norm(width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        b, t, _ = x.shape
        h = self.attention_norm(x)
        q = self.wq(h).view(b, t, self.heads, self.size).transpose(1, 2)
        k = self.wk(h).view(b, t, self.kv_heads, self.size).transpose(1, 2)
        v = self.wv(h).view(b, t, self.kv_heads, self.size).transpose(1, 2)
        q, k = _rotated(q, cos, sin), _rotated(k, cos, sin)
        group = self.heads // self.kv_heads
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        scores = (q @ k.transpose(-1, -2)) * self.size**-0.5
        weights = F.softmax((scores + mask).float(), dim=-1).type_as(q)
        x = x + self.wo((weights @ v).transpose(1, 2).reshape(b, t, -1))
        h = self.ffn_norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    one, other = x.float().chunk(2, dim=-1)
    turned = torch.cat((-other, one), dim=-1)
    return (x.float() * cos + turned * sin).type_as(x)


class Llama(nn.Module):
    """Attention, rotary positions and norms by hand; 8B parameters at 32 layers."""

    cos: Tensor
    sin: Tensor

    def __init__(self, layers: int, width: int = 4096, limit: int = 8192) -> None:
        super().__init__()
        with torch.device("meta"):
            self.embedding = nn.Embedding(128256, width)
            self.blocks = nn.ModuleList(_Block(width, 32, 8, 14336) for _ in range(layers))
            self.norm = _Norm(width)
            self.head = nn.Linear(width, 128256, bias=False)
        self.bfloat16()
        angles = torch.arange(limit)[:, None] * 5e5 ** -(torch.arange(0, 128, 2) / 128)
        self.register_buffer("cos", torch.cat((angles, angles), -1).cos(), persistent=False)
        self.register_buffer("sin", torch.cat((angles, angles), -1).sin(), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        t = tokens.shape[1]
        x = self.embedding(tokens)
        mask = torch.full((t, t), float("-inf"), dtype=x.dtype, device=x.device).triu(1)
        for block in self.blocks:
            x = block(x, self.cos[:t], self.sin[:t], mask)
        return self.head(self.norm(x)).float()


def _measure(layers: int) -> None:
    """In the child: prints seconds and peak memory as JSON."""
    torch.set_num_threads(2)
    model = Llama(layers)
    fxport.port(Llama(1))  # imports, and what torch sets up once
    start = time.perf_counter()
    port = fxport.port(model)
    seconds = time.perf_counter() - start
    assert len(port.serving.attention) == layers
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    billions = sum(p.numel() for p in model.parameters()) / 1e9
    click.echo(json.dumps({"seconds": seconds, "peak_mib": peak, "billions": billions}))


@click.command(help=__doc__)
@click.option("--layers", default="8,16,32,64", show_default=True)
@click.option("--repeats", default=3, show_default=True)
@click.option("--child", type=int, hidden=True)
def main(layers: str, repeats: int, child: int | None) -> None:
    if child is not None:
        return _measure(child)
    rows = []
    for depth in map(int, layers.split(",")):
        runs = [_run(depth) for _ in range(repeats)]
        seconds = statistics.median(r["seconds"] for r in runs)
        peak = max(r["peak_mib"] for r in runs)
        rows.append((depth, runs[0]["billions"], seconds, seconds / depth, peak))
    header = ("layers", "parameters, 1e9", "seconds", "seconds a layer", "peak MiB")
    click.echo(tabulate(rows, header, floatfmt=(".0f", ".1f", ".1f", ".2f", ".0f")))


def _run(depth: int) -> dict[str, float]:
    command = [sys.executable, "-m", "fxport.tools.bench_port", "--child", str(depth)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured


if __name__ == "__main__":
    main()
