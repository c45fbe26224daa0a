"""What the log says about how a port was divided."""

from __future__ import annotations

import math
from collections import Counter

from fxport.parallel.plan import Plan

__all__ = ["summary", "weight_bytes"]


def weight_bytes(plan: Plan, itemsize: int) -> tuple[int, list[int]]:
    """Bytes of all parameters, and of each rank's part without padding."""
    whole = sum(math.prod(s.shape) for s in plan.parameters) * itemsize
    ranks = range(plan.world_size)
    return whole, [
        sum(math.prod(s.local_shape(r)) for s in plan.parameters) * itemsize for r in ranks
    ]


def summary(plan: Plan, itemsize: int) -> str:
    """Weights and collectives in one line, then one line for each reason to replicate."""
    whole, parts = weight_bytes(plan, itemsize)
    calls = Counter(c.kind for c in plan.collectives if c.direction == "forward")
    lines = [
        f"fxport: divided over {plan.world_size} ranks; weights {whole:,} bytes, of which a rank "
        f"holds {max(parts):,}; each step {calls['all_reduce']} all-reduces, "
        f"{calls['all_gather']} all-gathers"
    ]
    for found in plan.replicated:
        lines.append(f"fxport: on every rank: {found.what}: {found.reason}")
    return "\n".join(lines)
