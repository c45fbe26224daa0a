"""bfloat16 and float16: errors within what rounding explains."""

from __future__ import annotations

import pytest
import torch
from attention_cases import CASES, Case, make, op, run
from torch import Tensor

from fxport.ops.params import AttentionParams
from fxport.ops.reference import reference_attention

UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # unit roundoff: 8 and 11 bits
HALF = list(UNIT)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("case", [c for c in CASES if "everything" in c.name], ids=str)
def test_blocked_computes_in_float32(case: Case, dtype: torch.dtype) -> None:
    """Inputs are exact in float32 and only results are rounded: bit for bit the float32 answer.

    Gradients differ from it by the rounding of out (through delta) and their own: 4 units.
    """
    half = make(case, dtype)
    got, want = run(op, half), run(op, half.to(torch.float32))
    assert torch.equal(got["out"], want["out"].to(dtype))
    assert torch.equal(got["lse"], want["lse"]) and got["lse"].dtype == torch.float32
    for name in half.differentiable:
        assert got[name].dtype == dtype
        error = (got[name].float() - want[name]).norm() / want[name].norm()
        assert error <= 4 * UNIT[dtype], name


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("kv_heads", [6, 2])
@pytest.mark.parametrize("causal", [False, True])
def test_cpu_flash_rounds_the_weights(dtype: torch.dtype, kv_heads: int, causal: bool) -> None:
    """Entry by entry, against float64 on the same inputs.

    The kernel rounds p and ds to the inputs' dtype before it multiplies them, and its results; u is
    the unit roundoff. With P, dS, delta exact and |.| entry by entry::

        err(out) <= u (|P| |V| + |out|)
        err(dS)  <= u |dS| + P (|dO| . err(out))            through delta
        err(dQ)  <= scale (err(dS) |K|) + u |dQ|            dK, dV likewise, summed over groups

    A factor of 1.5 is left for second order terms and the kernel's approximate exp (6e-5).
    """
    params = AttentionParams(0.3, causal=causal)
    arguments = make(
        Case("", kv_heads=kv_heads, rows=130, columns=150, size=16, params=params), dtype
    )
    exact = arguments.to(torch.float64)
    got, want = (
        run(f, a, with_lse=False) for f, a in ((op, arguments), (reference_attention, exact))
    )
    bounds = _bounds(exact.tensors, want, params, UNIT[dtype])
    for name, bound in bounds.items():
        excess = (got[name].double() - want[name]).abs() / (1.5 * bound + 1e-6)
        assert excess.max().item() <= 1, (name, excess.max().item())
    assert (got["lse"].double() - want["lse"]).abs().max() < 2e-4


def _bounds(
    tensors: tuple[Tensor | None, ...], want: dict[str, Tensor], params: AttentionParams, u: float
) -> dict[str, Tensor]:
    q, k, v = (x.detach() for x in tensors[:3] if x is not None)
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = params.scale * q @ k.mT
    if params.causal:
        scores = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), -torch.inf)
    p = scores.softmax(-1)
    out = p @ v
    generator = torch.Generator().manual_seed(1)
    d_out = torch.randn(out.shape, generator=generator, dtype=torch.float64)  # as `run` makes it
    err_out = u * (p @ v.abs() + out.abs())
    ds = p * (d_out @ v.mT - (d_out * out).sum(-1, keepdim=True))
    err_ds = u * ds.abs() + p * (d_out.abs() * err_out).sum(-1, keepdim=True)
    # the incoming gradient is rounded to the dtype as well
    err_ds += p * u * (d_out.abs() @ v.abs().mT + (d_out * out).abs().sum(-1, keepdim=True))

    def to_kv(x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, groups)).sum(2)

    def per_head(x: Tensor, y: Tensor) -> Tensor:  # each head's gradient is rounded, then the sum
        return to_kv(x + u * y.abs()) + u * to_kv(y).abs()

    return {
        "out": err_out,
        "q": params.scale * err_ds @ k.abs() + u * want["q"].abs(),
        "k": per_head(params.scale * err_ds.mT @ q.abs(), params.scale * ds.mT @ q),
        "v": per_head(2 * u * p.mT @ d_out.abs(), p.mT @ d_out),
    }
