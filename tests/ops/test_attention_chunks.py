"""Chunks of positions: against the dense formula, however the op folds them."""

from __future__ import annotations

import pytest
import torch
from attention_cases import Case, assert_same, make, op, op_on_gpu, run
from triton_cases import ROUNDING

from fxport.ops.attention import attention
from fxport.ops.chunks import Chunks
from fxport.ops.params import AttentionParams as P
from fxport.ops.reference import reference_attention

DIVIDES = P(0.3, causal=True, chunk=12)
RAGGED = P(0.3, causal=True, chunk=11)
CASES = (
    Case("divides", params=DIVIDES),
    Case("ragged", params=RAGGED),
    Case("ragged-one-sequence", batch=1, params=RAGGED),
    Case("of-one", params=P(0.3, causal=True, chunk=1)),
    Case("all-but-one", params=P(0.3, causal=True, chunk=47)),
    Case("as-long", params=P(0.3, causal=True, chunk=48)),
    Case("longer", params=P(0.3, causal=True, chunk=100)),
    Case("both-ways", params=P(0.3, chunk=12)),
    Case("both-ways-ragged", params=P(0.3, chunk=11)),
    Case("window", params=P(0.3, causal=True, window_left=5, chunk=11)),
    Case("wide-window", params=P(0.3, causal=True, window_left=30, chunk=11)),
    Case("softcap", value_size=7, params=P(0.9, causal=True, softcap=1.5, chunk=11)),
    Case("sinks", sinks=True, params=RAGGED),
    Case("sinks-divides", sinks=True, params=DIVIDES),
    Case("alibi", alibi_slopes=True, params=RAGGED),
    Case("alibi-divides", kv_heads=1, alibi_slopes=True, params=DIVIDES),
    Case("no-groups", kv_heads=6, params=RAGGED),
    Case("packed", batch=1, cu_seqlens=(0, 5, 5, 30, 48), params=RAGGED),
    Case("packed-divides", batch=1, cu_seqlens=(0, 1, 13, 25, 48), params=DIVIDES),
    Case("packed-of-one", batch=1, cu_seqlens=(0, 48), params=P(0.3, True, chunk=1)),
    Case("packed-both-ways", batch=1, cu_seqlens=(0, 40, 48), params=P(0.3, chunk=7)),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_lse_and_gradients(case: Case) -> None:
    arguments = make(case.but(rows=48, columns=48))
    assert_same(run(op, arguments), run(reference_attention, arguments), 1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_on_the_gpu(case: Case, dtype: torch.dtype) -> None:
    """By whichever kernels take the folded calls."""
    value = case.value_size and 8 * case.value_size
    arguments = make(case.but(rows=48, columns=48, size=64, value_size=value), dtype)
    want = run(reference_attention, arguments.to(torch.float64))
    assert_same(run(op_on_gpu, arguments), want, ROUNDING[dtype])


@pytest.mark.parametrize("params", [DIVIDES, RAGGED])
def test_dropout_drops_the_same_weights_backward(params: P) -> None:
    q = torch.randn(2, 2, 24, 4, dtype=torch.float64, requires_grad=True)
    k, v = torch.randn(2, 2, 2, 24, 4, dtype=torch.float64).unbind(0)
    seed = torch.tensor([3])
    kept = P(params.scale, params.causal, dropout_p=0.4, chunk=params.chunk)
    assert torch.autograd.gradcheck(lambda q: attention(q, k, v, seed=seed, params=kept), q)


@pytest.mark.parametrize("params", [DIVIDES, RAGGED, P(0.3, chunk=11)])
@pytest.mark.parametrize("batch", [1, 2])
def test_the_op_is_what_tracing_is_told(params: P, batch: int) -> None:
    arguments = make(Case("", batch=batch, rows=24, columns=24, params=params), torch.float32)
    numbers = (params.scale, params.causal, -1, -1, 0.0, 0.0, 0, 0, params.chunk)
    torch.library.opcheck(torch.ops.fxport.attention.default, (*arguments.tensors, *numbers))


def test_no_square_is_made_and_nothing_moves() -> None:
    """Operands that lie as ``[B, T, H, D]`` are folded where they are."""
    q = torch.randn(2, 24, 3, 4).transpose(1, 2)
    for chunk in (12, 11):
        chunks = Chunks.of(q, None, (0.0,) * 8 + (chunk,))
        assert chunks is not None
        folded = chunks.fold(q)
        assert folded.data_ptr() == q.data_ptr()
        assert chunks.unfold(folded).stride() == q.stride()
    borders = Chunks(2, 24, 11).borders(q.device)
    assert borders is not None and borders.tolist() == [0, 11, 22, 24, 35, 46, 48]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (Case("", rows=37, columns=53, params=RAGGED), "one length"),
        (Case("", rows=48, columns=48, bias_shape=(48, 48), params=RAGGED), "bias"),
        (Case("", rows=48, columns=48, params=P(0.3, q_offset=1, chunk=4)), "q_offset"),
        (Case("", rows=48, columns=48, params=P(0.3, chunk=-1)), "chunk"),
    ],
    ids=["lengths", "bias", "offset", "negative"],
)
def test_what_goes_with_no_chunks(case: Case, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(op, make(case))
