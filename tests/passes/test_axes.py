"""Reshape and broadcast of labelled dimensions."""

import pytest
import sympy

from fxport.passes.axes import Axis, Refusal, Symbols, join, reshape

B, T = sympy.Symbol("s1", integer=True, positive=True), sympy.Symbol("s2", integer=True)
SYMBOLS = Symbols(B, T)
BATCH, TOKEN = (Axis.BATCH,), (Axis.TOKEN,)


@pytest.mark.parametrize(
    ("axes", "sizes", "expected"),
    [
        ((BATCH, TOKEN, (96,)), (B, T, 3, 32), (BATCH, TOKEN, (3,), (32,))),
        ((BATCH, TOKEN, (3,), (32,)), (B, T, 96), (BATCH, TOKEN, (96,))),
        ((BATCH, TOKEN, (96,)), (B * T, 96), ((Axis.BATCH, Axis.TOKEN), (96,))),
        (((Axis.BATCH, Axis.TOKEN), (96,)), (B, T, 2, 48), (BATCH, TOKEN, (2,), (48,))),
        ((TOKEN, BATCH, (6,)), (T * B, 6), ((Axis.TOKEN, Axis.BATCH), (6,))),
        ((BATCH, (4,), TOKEN, (8,)), (4 * B, T, 8), ((Axis.BATCH, 4), TOKEN, (8,))),
        (((12,), TOKEN), (1, 4, 3, T), ((), (4,), (3,), TOKEN)),
        ((TOKEN, (6, Axis.BATCH)), (T, 2, 3 * B), (TOKEN, (2,), (3, Axis.BATCH))),
    ],
)
def test_reshape_regroups_factors(axes, sizes, expected):
    assert reshape(axes, sizes, SYMBOLS) == expected


@pytest.mark.parametrize(
    ("axes", "sizes"),
    [
        ((BATCH, TOKEN, (96,)), (T, B, 96)),  # scrambles batch and tokens
        ((BATCH, (4,), TOKEN, (8,)), (B, T, 32)),  # heads before tokens: not a transpose
        ((BATCH, TOKEN, (96,)), (B, 96, T)),
        ((BATCH, TOKEN, (96,)), (B, T + 1, 96)),
        (((4,), (9,)), (6, 6, 1, T)),
    ],
)
def test_reshape_refuses_to_cut_through_tokens(axes, sizes):
    with pytest.raises(Refusal):
        reshape(axes, sizes, SYMBOLS)


def test_broadcast_joins():
    assert join((BATCH, TOKEN, (8,)), ((8,),)) == (BATCH, TOKEN, (8,))
    assert join((BATCH, TOKEN, (8,)), (TOKEN, ())) == (BATCH, TOKEN, (8,))
    assert join((BATCH, (2, 4)), ((), (8,))) == (BATCH, (2, 4))


def test_broadcast_refuses_token_against_feature_and_pairs_of_tokens():
    with pytest.raises(Refusal, match="combined"):
        join((BATCH, TOKEN), (BATCH, (8,)))
    with pytest.raises(Refusal, match="two token dimensions"):
        join((TOKEN, ()), (TOKEN,))
