"""A tensor written piece by piece becomes its pieces joined; what is not quite that stays."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

import fxport
from fxport.errors import PortError
from fxport.passes.functional import functionalise
from fxport.passes.slice_writes import join_written_pieces

aten = torch.ops.aten


def traced(function: Callable[..., Tensor], *inputs: Tensor) -> fx.GraphModule:
    return make_fx(function, tracing_mode="fake", pre_dispatch=True)(*inputs)


def two_parts(x: Tensor) -> Tensor:
    y = x.new_empty(x.shape[0], x.shape[1], 2 * x.shape[2])
    y[..., : x.shape[2]].copy_(x.sin())
    y[..., x.shape[2] :].copy_(x.cos())
    return y.transpose(1, 2) * 2


def three_parts_in_another_order(x: Tensor) -> Tensor:
    y = torch.zeros(3, *x.shape, dtype=x.dtype)
    y[2:].copy_(x.sin()[None])
    y[:1].copy_(x.cos()[None])
    y[1:2].copy_(x.exp()[None])
    return y


def two_in_turns(x: Tensor) -> Tensor:
    """As rotated pairs are put back."""
    y = x.new_empty(x.shape[0], x.shape[1], 2 * x.shape[2])
    y[..., 1::2] = x.sin()
    y[..., ::2] = x.cos()
    return y * 2


def three_in_turns_along_the_first_axis(x: Tensor) -> Tensor:
    y = x.new_zeros(3 * x.shape[0], *x.shape[1:])
    y[::3], y[1::3], y[2::3] = x.sin(), x.cos(), x.exp()
    return y * 2


def rows_selected_from_the_last(x: Tensor) -> Tensor:
    """As keys and values are put into one tensor."""
    y = torch.zeros(x.shape[0], 2, *x.shape[1:], dtype=x.dtype)
    y[:, -1], y[:, 0] = x.sin(), x.cos()
    return y * 2


JOINED = [
    rows_selected_from_the_last,
    two_parts,
    three_parts_in_another_order,
    two_in_turns,
    three_in_turns_along_the_first_axis,
]


@pytest.mark.parametrize("function", JOINED)
def test_pieces_are_joined(function: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(3, 7, 5, dtype=torch.float64)
    gm = traced(function, x)
    assert join_written_pieces(gm) == 1
    functionalise(gm)
    targets = [n.target for n in gm.graph.nodes]
    assert {aten.cat.default, aten.stack.default} & set(targets)
    assert aten.copy_.default not in targets
    torch.testing.assert_close(gm(x), function(x), rtol=0, atol=0)
    one, other = (x.clone().requires_grad_() for _ in range(2))
    weights = torch.randn_like(gm(x))
    (gm(one) * weights).sum().backward()
    (function(other) * weights).sum().backward()
    torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=1e-14)


def a_gap(x: Tensor) -> Tensor:
    y = x.new_zeros(x.shape[0], x.shape[1], 11)
    y[..., :5].copy_(x)
    y[..., 6:].copy_(x)
    return y * 2


def one_of_two_turns(x: Tensor) -> Tensor:
    y = x.new_zeros(x.shape[0], x.shape[1], 10)
    y[..., ::2] = x
    return y * 2


def turns_that_leave_the_last_out(x: Tensor) -> Tensor:
    y = x.new_zeros(x.shape[0], x.shape[1], 11)
    y[..., :10:2] = x
    y[..., 1::2] = x.sin()
    return y * 2


def the_same_turn_twice(x: Tensor) -> Tensor:
    y = x.new_zeros(x.shape[0], x.shape[1], 10)
    y[..., ::2] = x
    y[..., 0:9:2] = x.sin()
    return y * 2


def a_row_selected_twice(x: Tensor) -> Tensor:
    y = x.new_zeros(2, *x.shape)
    y[1], y[-1] = x, x.sin()
    return y * 2


def overlapping(x: Tensor) -> Tensor:
    y = x.new_zeros(x.shape[0], x.shape[1], 9)
    y[..., 4:].copy_(x)
    y[..., :5].copy_(x.sin())
    return y * 2


def read_in_between(x: Tensor) -> Tensor:
    y = x.new_zeros(x.shape[0], x.shape[1], 10)
    y[..., :5].copy_(x)
    half = y.sin()
    y[..., 5:].copy_(x)
    return y + half


def seen_through_an_earlier_view(x: Tensor) -> Tensor:
    y = x.new_zeros(x.shape[0], x.shape[1], 10)
    view = y.transpose(0, 1)
    y[..., :5].copy_(x)
    y[..., 5:].copy_(x.sin())
    return view * 2


def written_once_more(x: Tensor) -> Tensor:
    y = x.new_zeros(x.shape[0], x.shape[1], 10)
    y[..., :5].copy_(x)
    y[..., 5:].copy_(x.sin())
    y[..., :1].copy_(x[..., :1].cos())
    return y * 2


def source_changed_in_between(x: Tensor) -> Tensor:
    y, a = x.new_zeros(x.shape[0], x.shape[1], 10), x.cos()
    y[..., :5].copy_(a)
    a.mul_(3.0)
    y[..., 5:].copy_(a)
    return y * 2


def of_another_type(x: Tensor) -> Tensor:
    y = torch.zeros(x.shape[0], x.shape[1], 10, dtype=torch.float32)
    y[..., :5].copy_(x)
    y[..., 5:].copy_(x.sin())
    return y * 2


def one_piece_without_gradient(x: Tensor) -> Tensor:
    y = x.new_empty(x.shape[0], x.shape[1], 2 * x.shape[2])
    y[..., : x.shape[2]].copy_(x.sin())
    with torch.no_grad():
        y[..., x.shape[2] :].copy_(x.cos())
    return y * 2


def test_pieces_in_another_grad_mode_stay() -> None:
    x = torch.randn(3, 7, 5, dtype=torch.float64, requires_grad=True)
    gm = traced(one_piece_without_gradient, x)
    assert join_written_pieces(gm) == 0


def into_a_view(x: Tensor) -> Tensor:
    y = x.new_zeros(10, x.shape[1], x.shape[0])
    view = y.transpose(0, 2)
    view[..., :5].copy_(x)
    view[..., 5:].copy_(x.sin())
    return y * 2


def one_column_for_several(x: Tensor) -> Tensor:
    y = x.new_zeros(x.shape[0], x.shape[1], 10)
    y[..., :5].copy_(x[..., :1])
    y[..., 5:].copy_(x)
    return y * 2


def turns_of_two_lengths(x: Tensor) -> Tensor:
    y = x.new_zeros(x.shape[0], x.shape[1], 9)
    y[..., ::2] = x
    y[..., 1::2] = x[..., 1:]
    return y * 2


PART_BY_PART = [
    a_gap,
    a_row_selected_twice,
    overlapping,
    read_in_between,
    written_once_more,
    source_changed_in_between,
    of_another_type,
    one_column_for_several,
]


@pytest.mark.parametrize("function", PART_BY_PART)
def test_what_is_more_than_that_is_written_part_by_part(
    function: Callable[[Tensor], Tensor],
) -> None:
    x = torch.randn(3, 7, 5, dtype=torch.float64)
    gm = traced(function, x)
    assert join_written_pieces(gm) == 0
    functionalise(gm)  # by `view_writes`
    torch.testing.assert_close(gm(x), function(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    "function",
    [one_of_two_turns, turns_that_leave_the_last_out, the_same_turn_twice, turns_of_two_lengths],
)
def test_turns_that_do_not_cover_the_axis_are_refused(function: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(3, 7, 5, dtype=torch.float64)
    gm = traced(function, x)
    assert join_written_pieces(gm) == 0
    with pytest.raises(PortError, match="changes a tensor"):
        functionalise(gm)


def test_what_an_earlier_view_shows_stays() -> None:
    x = torch.randn(3, 7, 5, dtype=torch.float64)
    gm = traced(seen_through_an_earlier_view, x)
    assert join_written_pieces(gm) == 0
    with pytest.raises(PortError, match="changes a tensor"):
        functionalise(gm)


def test_what_a_view_was_taken_of_is_written() -> None:
    x = torch.randn(3, 7, 5, dtype=torch.float64)
    gm = traced(into_a_view, x)
    join_written_pieces(gm)
    gm.recompile()
    torch.testing.assert_close(gm(x), into_a_view(x), rtol=0, atol=0)


def test_an_argument_is_left_alone() -> None:
    """Its caller sees the writes."""

    def into_argument(x: Tensor, y: Tensor) -> Tensor:
        y[..., :5].copy_(x)
        y[..., 5:].copy_(x)
        return y * 2

    x, y = torch.randn(3, 7, 5), torch.randn(3, 7, 10)
    assert join_written_pieces(traced(into_argument, x, y)) == 0


class Filled(nn.Module):
    """Writes one number over a feature of every token, or over a token."""

    def __init__(self, along_tokens: bool) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(61, 32), nn.Linear(32, 61)
        self.along_tokens = along_tokens

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)[:, None]
        y = F.scaled_dot_product_attention(x, x, x, is_causal=True)[:, 0]
        if self.along_tokens:
            y[:, -1] = 0.5
        else:
            y[..., 3] = 0.5
            y[:, :, 20:] = x[:, 0, :, 20:]
        return self.head(y)


def test_numbers_written_over_features() -> None:
    torch.manual_seed(0)
    fxport.port(Filled(along_tokens=False).eval(), max_seq_len=64)  # compares the logits
    with pytest.raises(PortError):
        fxport.port(Filled(along_tokens=True).eval(), max_seq_len=64)
