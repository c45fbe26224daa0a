"""No tensor with two sequence lengths: every tensor that an implementation makes is seen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_cases import Arguments, Case, make
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fxport.ops import blocked, cpu_flash
from fxport.ops.params import AttentionParams
from fxport.ops.reference import reference_attention
from fxport.ops.tiles import block_length

LENGTH = 1100  # longer than any block
BASE = Case("plain", batch=1, q_heads=2, kv_heads=1, rows=LENGTH, columns=LENGTH + 50, size=8)
CAUSAL = AttentionParams(0.3, causal=True)


class Largest(TorchDispatchMode):
    """The largest tensor that any operation returned, in elements of its own memory."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                stored = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) + 1
                self.elements = max(self.elements, stored if x.numel() else 0)
        return result


def _largest(module: Any, arguments: Arguments) -> int:
    tensors = [None if x is None else x.detach() for x in arguments.tensors]
    q, k, v, *rest = tensors
    floating = tuple(x is not None and x.is_floating_point() for x in tensors[:6])
    with_lse = module is not cpu_flash
    with Largest() as largest:
        out, lse = module.forward(*tensors, arguments.params)
        module.backward(
            torch.ones_like(out),
            torch.ones_like(lse) if with_lse else None,
            *(q, k, v, out, lse),
            *rest,
            arguments.params,
            floating,
        )
    return largest.elements


@pytest.mark.parametrize(
    "case",
    [
        BASE.but(),
        BASE.but(name="causal", params=CAUSAL),
        BASE.but(
            name="everything",
            params=AttentionParams(0.3, True, window_left=700, softcap=2.0, dropout_p=0.1),
            bias_shape=(2, 1, LENGTH + 50),
            sinks=True,
            alibi_slopes=True,
        ),
        BASE.but(name="bool", bias_shape=(LENGTH, 1), bias_dtype=torch.bool),
        BASE.but(name="packed", columns=LENGTH, params=CAUSAL, cu_seqlens=(0, 7, 900, LENGTH)),
    ],
    ids=str,
)
def test_blocked(case: Case) -> None:
    assert block_length(case.batch * case.q_heads) < LENGTH // 2
    elements = _largest(blocked, make(case, torch.float32))
    assert elements < case.rows * case.columns // 4
    assert elements >= block_length(2) ** 2, "the tiles were not seen: the test shows nothing"


@pytest.mark.parametrize(
    "case",
    [
        BASE.but(),
        BASE.but(name="causal-sinks", params=CAUSAL, sinks=True),
        BASE.but(name="keys", bias_shape=(LENGTH + 50,), bias_dtype=torch.bool),
        BASE.but(name="packed", columns=LENGTH, params=CAUSAL, cu_seqlens=(0, 7, 900, LENGTH)),
    ],
    ids=str,
)
def test_cpu_flash(case: Case) -> None:
    """What is made around ATen's kernel; its own scratch is per thread and per block."""
    elements = _largest(cpu_flash, make(case, torch.float32))
    assert elements <= case.q_heads * case.columns * case.size


def test_the_dense_formula_would_be_seen() -> None:
    arguments = make(BASE, torch.float32)
    with Largest() as largest:
        reference_attention(*arguments.tensors, arguments.params)
    assert largest.elements >= LENGTH * LENGTH


@pytest.mark.parametrize("heads", [1, 2, 12, 96, 1024, 10**6])
def test_blocks_are_bounded(heads: int) -> None:
    assert 64 <= block_length(heads) <= 256
