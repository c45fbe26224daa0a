"""What mixes tokens is refused at its line; what counts positions is found."""

from __future__ import annotations

import linecache
import math

import pytest
import sympy
import torch
import torch.nn.functional as F
from torch import nn

from fxport.capture.export import capture
from fxport.capture.inputs import graph_input
from fxport.errors import PortError, ReasonCode
from fxport.passes.axes import Axis, Refusal, Symbols
from fxport.passes.functional import functionalise
from fxport.passes.head import find_head
from fxport.passes.limits import longest_sequence
from fxport.passes.tokens.locality import Locality, analyse
from fxport.passes.tokens.rules import propagate

V, C = 41, 24


class Base(nn.Module):
    """Embedding, something in between, head."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(V, C)
        self.head = nn.Linear(C, V)
        self.mix = nn.Linear(C, C)
        self.conv = nn.Conv1d(C, C, 3, padding=2, groups=C)
        self.wpe = nn.Embedding(64, C)
        self.gain = nn.Parameter(torch.rand(1, C, 1))
        self.register_buffer("pe", torch.randn(1, 64, C))
        self.register_buffer("places", torch.tensor([5, 2, 11]))
        self.register_buffer("chosen", torch.arange(C) % 3 > 0)
        self.register_buffer("inv_freq", 1.0 / 100 ** (torch.arange(0, C, 2).float() / C))

    def forward(self, idx):
        return self.head(self.between(self.wte(idx), idx))


def run(model: nn.Module) -> Locality:
    captured = capture(model)
    functionalise(captured.graph)
    find_head(captured.graph, captured.length)
    symbols = Symbols(captured.batch, captured.length)
    return analyse(captured.graph, symbols, captured.limit or 64)


def conv(self, x, idx):
    return self.conv(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)  # HERE


def cumulative_mean(self, x, idx):
    return x.cumsum(dim=1)  # HERE


def shift(self, x, idx):
    return x + F.pad(x, (0, 0, 1, -1))  # HERE


def roll(self, x, idx):
    return x + x.roll(1, dims=1)  # HERE


def mean_over_tokens(self, x, idx):
    return x + x.mean(dim=1, keepdim=True)  # HERE


def softmax_over_tokens(self, x, idx):
    return x * x.softmax(1)  # HERE


def linear_over_tokens(self, x, idx):
    return x + (x.transpose(1, 2) @ x).mean(1, keepdim=True)  # HERE


def product_of_all_tokens(self, x, idx):
    return x * torch.vdot(x.flatten(), x.flatten())  # HERE


def narrowed_shift(self, x, idx):
    return x + F.pad(x.narrow(1, 0, x.size(1) - 1), (0, 0, 1, 0))  # HERE


def begin_of_sequence(self, x, idx):
    bos = self.wpe.weight[:1].expand(x.shape[0], 1, C)
    return torch.cat((bos, x), 1)  # HERE


def drop_first(self, x, idx):
    return x[:, 1:]  # HERE


def over_the_batch(self, x, idx):
    return x - x.mean(0, keepdim=True)  # HERE


def length_as_a_number(self, x, idx):
    return x * math.sqrt(idx.shape[1])  # HERE


def length_as_a_number_of_a_tensor(self, x, idx):
    return x / torch.full((1,), idx.shape[1])  # HERE


def scrambled(self, x, idx):
    B, T, _ = x.shape
    return x.reshape(T, B, C).transpose(0, 1)  # HERE


def reversed_positions(self, x, idx):
    T = idx.shape[1]
    return x + self.wpe(torch.arange(T - 1, -1, -1))  # HERE


def last_rows_of_a_table(self, x, idx):
    return x + self.pe[:, 64 - x.size(1) :]  # HERE


def rows_that_start_at_the_length(self, x, idx):
    T = x.size(1)
    return x + self.wpe.weight[T : T + 1]  # HERE


def padded_on_the_left(self, x, idx):
    return x + F.pad(self.inv_freq[:2], (x.size(1) - 2, 0))[:, None]  # HERE


def squeezed(self, x, idx):
    return x[..., None].squeeze()  # HERE


def squeezed_batch(self, x, idx):
    return x + x.squeeze(0)  # HERE


def fraction_of_the_length(self, x, idx):
    T = idx.shape[1]
    return x + (torch.arange(T) / T)[:, None]  # HERE


def einsum_with_dots_over_tokens(self, x, idx):
    return x + torch.einsum("...tc,...td->...cd", x, x).mean(1, keepdim=True)  # HERE


def vector_over_tokens(self, x, idx):
    return x + (x.transpose(1, 2) @ x[..., 0].transpose(0, 1)).mean()  # HERE


def tensor_product_over_tokens(self, x, idx):
    return x + torch.tensordot(x, x, ([0, 1], [0, 1])).mean(0)  # HERE


def group_norm_over_tokens(self, x, idx):
    return F.group_norm(x.transpose(1, 2), 4).transpose(1, 2)  # HERE


def similarity_over_tokens(self, x, idx):
    return x * F.cosine_similarity(x, x.exp(), dim=1)[:, None]  # HERE


def diagonal_over_tokens(self, x, idx):
    picked = x.repeat(1, 1, 3).diagonal(dim1=1, dim2=2)  # HERE
    return x * picked.mean(-1)[:, None, None]


def largest_so_far(self, x, idx):
    return x.cummax(1).values  # HERE


def moved_by_padding(self, x, idx):
    y = F.conv1d(x.transpose(1, 2), self.mix.weight[..., None], padding=1)  # HERE
    return y[..., : x.shape[1]].transpose(1, 2)


def a_kernel_made_of_tokens(self, x, idx):
    scores = F.conv1d(x.transpose(1, 2), x.flatten(0, 1)[..., None])  # HERE
    return x * scores.mean(1)[..., None]


def written_into_the_first_token(self, x, idx):
    y = torch.zeros_like(x)
    y[:, self.places[:1] * 0] = x[:, :1]  # HERE
    return x + y


def written_where_tokens_say(self, x, idx):
    table = self.pe[0].clone()
    table[idx] = x  # HERE
    return x + table[0]


def added_along_tokens(self, x, idx):
    return x.index_add(1, torch.arange(x.shape[1]), x)  # HERE


def added_where_tokens_say(self, x, idx):
    return x + x.new_zeros(V, C).index_add(0, idx[0], x[0])[0]  # HERE


MIXING = [
    (written_into_the_first_token, ReasonCode.MIXES_TOKENS),
    (written_where_tokens_say, ReasonCode.MIXES_TOKENS),
    (added_along_tokens, ReasonCode.MIXES_TOKENS),
    (added_where_tokens_say, ReasonCode.MIXES_TOKENS),
    (moved_by_padding, ReasonCode.MIXES_TOKENS),
    (a_kernel_made_of_tokens, ReasonCode.MIXES_TOKENS),
    (einsum_with_dots_over_tokens, ReasonCode.MIXES_TOKENS),
    (vector_over_tokens, ReasonCode.MIXES_TOKENS),
    (tensor_product_over_tokens, ReasonCode.MIXES_TOKENS),
    (group_norm_over_tokens, ReasonCode.MIXES_TOKENS),
    (similarity_over_tokens, ReasonCode.MIXES_TOKENS),
    (diagonal_over_tokens, ReasonCode.MIXES_TOKENS),
    (largest_so_far, ReasonCode.MIXES_TOKENS),
    (conv, ReasonCode.MIXES_TOKENS),
    (cumulative_mean, ReasonCode.MIXES_TOKENS),
    (shift, ReasonCode.MIXES_TOKENS),
    (roll, ReasonCode.MIXES_TOKENS),
    (mean_over_tokens, ReasonCode.MIXES_TOKENS),
    (softmax_over_tokens, ReasonCode.MIXES_TOKENS),
    (product_of_all_tokens, ReasonCode.MIXES_TOKENS),
    (linear_over_tokens, ReasonCode.MIXES_TOKENS),
    (begin_of_sequence, ReasonCode.MIXES_TOKENS),
    (narrowed_shift, ReasonCode.MIXES_TOKENS),
    (drop_first, ReasonCode.MIXES_TOKENS),
    (over_the_batch, ReasonCode.MIXES_TOKENS),
    (length_as_a_number_of_a_tensor, ReasonCode.DEPENDS_ON_LENGTH),
    (scrambled, ReasonCode.MIXES_TOKENS),
    (reversed_positions, ReasonCode.POSITION_UNKNOWN),
    (last_rows_of_a_table, ReasonCode.DEPENDS_ON_LENGTH),
    (rows_that_start_at_the_length, ReasonCode.POSITION_UNKNOWN),
    (padded_on_the_left, ReasonCode.DEPENDS_ON_LENGTH),
    (squeezed, ReasonCode.UNSUPPORTED_OP),
    (squeezed_batch, ReasonCode.UNSUPPORTED_OP),
    (fraction_of_the_length, ReasonCode.DEPENDS_ON_LENGTH),
]


@pytest.mark.parametrize(("between", "code"), MIXING, ids=lambda x: getattr(x, "__name__", ""))
def test_mixing_is_refused_at_its_line(between, code):
    model = type("Model", (Base,), {"between": between})()
    try:
        reasons = run(model).reasons
    except PortError as error:
        reasons = error.reasons
    assert reasons, "not refused"
    found = reasons[0]
    assert found.location is not None
    assert found.location.file == __file__
    assert "# HERE" in linecache.getline(__file__, found.location.line), str(found)
    assert found.code is code, str(found)


def written_at_a_mask_of_features(self, x, idx):
    """As in loralib's MergedLinear."""
    y = x.new_zeros(*x.shape[:-1], C).view(-1, C)
    y[:, self.chosen] = x.reshape(-1, C)[:, : C - C // 3]
    return y.view_as(x)


def written_at_features(self, x, idx):
    y = torch.zeros_like(x)
    y[..., self.places] = x[..., :3]
    y[..., self.places] += self.inv_freq[:3]
    return x + y


def copied_to_features(self, x, idx):
    y = x.index_copy(-1, self.places, x[..., :3]).index_fill(-1, self.places[:1], 0.5)
    return y.index_add(2, self.places, x[..., -3:])


def learned(self, x, idx):
    return x + self.wpe(torch.arange(idx.shape[1], device=idx.device))


def learned_offset(self, x, idx):
    return x + self.wpe(torch.arange(2, idx.shape[1] + 2))


def learned_rows(self, x, idx):
    return x + self.wpe.weight[: idx.shape[1]]


def float_positions(self, x, idx):
    cached = 0.0
    angles = torch.outer(torch.arange(idx.shape[1] + cached), self.inv_freq)
    return x * torch.cat((angles.cos(), angles.sin()), -1)


def counted_by_a_float(self, x, idx):
    return x + torch.arange(0.0, idx.shape[1], step=1.0)[:, None]


def every_second_position(self, x, idx):
    return x + torch.arange(0, 2.0 * idx.shape[1], step=2.0)[:, None]


def joined_alone(self, x, idx):
    return torch.cat([self.mix(x)], dim=-2)


def expanded(self, x, idx):
    B, T = idx.shape
    return x + self.wpe(torch.arange(T).unsqueeze(0).expand(B, T))


def counted(self, x, idx):
    return x + self.wpe(torch.ones(idx.shape[1], dtype=torch.long).cumsum(0) - 1)


def buffer_rows(self, x, idx):
    return x + self.pe[:, : x.size(1)]


def narrowed_to_all(self, x, idx):
    rows = self.pe[0][torch.arange(x.size(1)).repeat(x.size(0), 1)]
    return x + rows.narrow(1, rows.size(1) - x.size(1), x.size(1))


def narrowed(self, x, idx):
    return x + self.pe.narrow(1, 0, x.size(1))


def on_the_fly(self, x, idx):
    angles = torch.outer(torch.arange(x.shape[1]).float(), self.inv_freq)
    return x * torch.cat((angles.cos(), angles.sin()), -1)


def einsum_angles(self, x, idx):
    angles = torch.einsum("i,j->ij", torch.arange(x.shape[1]).float(), self.inv_freq)
    return x * torch.cat((angles, angles), -1).cos()[None]


def inv_freq_in_forward(self, x, idx):
    inv_freq = 1.0 / 100 ** (torch.arange(0, C, 2).float() / C)
    angles = torch.outer(torch.arange(x.shape[1]).float(), inv_freq)
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.polar(
        torch.ones_like(angles), angles
    )
    return torch.view_as_real(turned).flatten(2)


def unknown_op_on_constants(self, x, idx):
    return x + torch.kron(torch.ones(2), torch.arange(C // 2).float())


def padded_features(self, x, idx):
    return F.pad(x, (1, 2))[..., 1:-2] + x


def squeezed_by_name(self, x, idx):
    return x[..., None].squeeze(-1) + x.unsqueeze(1).squeeze(1)


def squeezed_gain(self, x, idx):
    return x * self.gain.squeeze()  # without the batch or the tokens in it: nothing to lose


def like_zeros(self, x, idx):
    return x + torch.zeros_like(x) + torch.ones(x.shape[0], x.shape[1], 1)


def folded(self, x, idx):
    B, T, _ = x.shape
    return self.mix(x.view(B * T, C)).view(B, T, C)


def time_first(self, x, idx):
    return self.mix(x.transpose(0, 1)).transpose(0, 1).contiguous()


def diagonals(self, x, idx):
    return x * self.mix(x).unflatten(-1, (4, 6)).diagonal(1, -2, -1).mean(-1, keepdim=True)


def per_head(self, x, idx):
    parts = [x[..., 6 * h : 6 * h + 6] * (h + 1) for h in range(4)]
    return torch.stack(parts, 2).flatten(2)


def routed(self, x, idx):
    weights, chosen = self.mix(x).softmax(-1).topk(2, -1)
    return x * weights.sum(-1, keepdim=True) + chosen.float().mean(-1, keepdim=True)


def in_place(self, x, idx):
    h = self.mix(x)
    h += x
    h.mul_(2.0)
    return h


def einsum_with_dots(self, x, idx):
    per_head = x.unflatten(-1, (4, 6))
    mixed = torch.einsum("...hd,hde->...he", per_head, self.mix.weight.view(4, 6, 24))
    return x + torch.einsum("...he,...hd", mixed, per_head).flatten(-2)[..., :C]


def vector_products(self, x, idx):
    gate = x @ self.mix.bias + torch.mv(self.mix.weight, self.mix.bias) @ self.mix.bias
    spectral = torch.vdot(self.mix.bias, torch.mv(self.mix.weight, self.mix.bias))
    return x * gate[..., None] / spectral


def tensor_product(self, x, idx):
    return torch.tensordot(x, self.mix.weight, dims=([2], [1])) + torch.tensordot(
        self.mix.weight, self.mix.bias, 1
    )


def group_norm(self, x, idx):
    B, T, _ = x.shape
    return F.group_norm(x.reshape(B * T, C), 4).view(B, T, C)


def similarity(self, x, idx):
    return x * F.cosine_similarity(x, self.mix.bias[None, None], dim=-1)[..., None]


def slopes(self, x, idx):
    return F.prelu(x, self.mix.bias[:1]) + F.rrelu(x) + F.alpha_dropout(x, 0.1, self.training)


def statistics(self, x, idx):
    spread, mean = torch.std_mean(x, -1, keepdim=True)
    low, high = torch.aminmax(x, dim=-1, keepdim=True)
    return (x - mean) / spread + x.cummax(-1).values / (high - low)


def convolved_alone(self, x, idx):
    y = F.conv1d(x.transpose(1, 2), self.mix.weight[..., None], self.mix.bias)
    y = F.conv1d(y, self.mix.weight[:, :6, None], padding="same", groups=4)
    return F.conv2d(y[..., None, :], self.mix.weight[..., None, None])[:, :, 0].transpose(1, 2)


def gated_by_a_cell(self, x, idx):
    rows, weight, bias = x.flatten(0, 1), self.mix.weight, self.mix.bias
    y = torch.gru_cell(rows, self.mix(rows), weight.repeat(3, 1), weight.repeat(3, 1))
    return torch.rnn_tanh_cell(y, y, weight, weight, bias, bias).view_as(x)


LOCAL = [
    (gated_by_a_cell, 0),
    (convolved_alone, 0),
    (einsum_with_dots, 0), (vector_products, 0), (tensor_product, 0), (group_norm, 0),
    (similarity, 0), (slopes, 0),
    (statistics, 0),
    (float_positions, 1), (counted_by_a_float, 1), (every_second_position, 1), (joined_alone, 0),
    (learned, 1), (learned_offset, 1), (learned_rows, 1), (expanded, 1), (counted, 1),
    (inv_freq_in_forward, 1), (unknown_op_on_constants, 0), (padded_features, 0),
    (buffer_rows, 1), (narrowed, 1), (narrowed_to_all, 1), (on_the_fly, 1),
    (einsum_angles, 1), (like_zeros, 0),
    (squeezed_by_name, 0), (squeezed_gain, 0),
    (written_at_a_mask_of_features, 0), (written_at_features, 0), (copied_to_features, 0),
    (folded, 0), (time_first, 0), (per_head, 0), (routed, 0), (in_place, 0),
    (diagonals, 0),
]  # fmt: skip


@pytest.mark.parametrize(("between", "rows"), LOCAL, ids=lambda x: getattr(x, "__name__", ""))
def test_token_local_models_are_proven(between, rows):
    model = type("Model", (Base,), {"between": between})()
    locality = run(model)
    assert not locality.reasons, str(locality.reasons[0])
    live = [n for n in locality.rows if n.users]
    assert len(live) >= rows
    assert bool(live) == bool(rows)


@pytest.mark.parametrize(
    ("rows", "weight", "found"),
    [
        (((Axis.BATCH, Axis.TOKEN), (4,)), ((4,), (4,)), ((Axis.BATCH, Axis.TOKEN), (4,))),
        (((Axis.BATCH,), (Axis.TOKEN,)), ((4,), (4,)), None),
        (((Axis.BATCH,), (4,)), ((4,), (Axis.TOKEN,)), None),
    ],
)
def test_a_recurrent_cell_may_not_run_along_tokens(rows, weight, found):
    graph = torch.fx.Graph()
    x, w = graph.placeholder("x"), graph.placeholder("w")
    cell = graph.call_function(torch.ops.aten.rnn_tanh_cell.default, (x, x, w, w))
    symbols = Symbols(*sympy.symbols("b t"))
    if found is not None:
        assert propagate(cell, {x: rows, w: weight}, symbols) == found
        return
    with pytest.raises(Refusal):
        propagate(cell, {x: rows, w: weight}, symbols)


B, T = (Axis.BATCH,), (Axis.TOKEN,)
PUTS = [  # where, dtype of the places, their axes, those of the values, whether it is local
    ((B, T, (6,)), 2, torch.int64, ((3,),), (B, T, (3,)), True),
    ((B, T, (6,)), 2, torch.int64, ((3,),), ((3,),), True),
    ((T, (6,)), 1, torch.int64, ((2,), (3,)), (T, (2,), (3,)), True),
    ((B, (2,), (3,)), 1, torch.bool, ((2,), (3,)), (B, (4,)), True),
    ((B, (2,), (3,)), 1, torch.int64, ((5,),), (B, (5,), (3,)), True),
    ((B, T, (6,)), 1, torch.int64, ((2,),), (B, (2,), (6,)), False),
    ((T, (2,), (3,)), 0, torch.bool, (T, (2,)), ((4,), (3,)), False),
    ((B, T, (6,)), 2, torch.int64, (T,), (B, T, T), False),
    ((T, B, (6,)), 2, torch.int64, ((3,),), (B, T, (3,)), False),
]


@pytest.mark.parametrize(("into", "at", "dtype", "places", "values", "local"), PUTS)
def test_writing_at_places_is_local_along_features(into, at, dtype, places, values, local):
    graph = torch.fx.Graph()
    y, index, x = map(graph.placeholder, ("y", "index", "x"))
    index.meta["val"] = torch.empty((), dtype=dtype)
    indices = [None] * at + [index]
    put = graph.call_function(torch.ops.aten.index_put.default, (y, indices, x))
    axes = {y: into, index: places, x: values}
    symbols = Symbols(*sympy.symbols("b t"))
    if local:
        assert propagate(put, axes, symbols) == into
    else:
        with pytest.raises(Refusal):
            propagate(put, axes, symbols)


COPIES = [
    ((T, (6,)), 1, ((2,),), (T, (2,)), True),
    (((6,), T), 0, ((2,),), ((2,), T), True),
    ((T, (6,)), 0, ((2,),), ((2,), (6,)), False),
    (((6,), (8,)), 0, (T,), ((), (8,)), False),
    (((6,), (8,)), 0, ((2,),), (T, (8,)), False),
    ((T, (6,)), 1, ((2,),), (B, (2,)), False),
]


@pytest.mark.parametrize("name", ["index_copy", "index_add"])
@pytest.mark.parametrize(("into", "dim", "places", "values", "local"), COPIES)
def test_copying_to_places_is_local_along_features(name, into, dim, places, values, local):
    graph = torch.fx.Graph()
    y, index, x = map(graph.placeholder, ("y", "index", "x"))
    target = getattr(torch.ops.aten, name).default
    copied = graph.call_function(target, (y, dim, index, x))
    axes = {y: into, index: places, x: values}
    symbols = Symbols(*sympy.symbols("b t"))
    if local:
        assert propagate(copied, axes, symbols) == into
    else:
        with pytest.raises(Refusal):
            propagate(copied, axes, symbols)


def test_every_second_position_is_a_table():
    """The length is asked for in a way that a symbol has no name for: plain lengths say it."""
    graph = capture(type("Model", (Base,), {"between": every_second_position})()).graph
    given = (graph_input(n).value for n in graph.graph.find_nodes(op="placeholder"))
    (table,) = (
        value for value in given if value is not None and value.dim() == 1 < len(value) // V
    )
    assert torch.equal(table, 2.0 * torch.arange(4096))


def test_offset_of_positions_is_kept():
    model = type("Model", (Base,), {"between": learned_offset})()
    assert [r.offset for r in run(model).rows.values()] == [2]


def test_positions_that_start_at_a_fraction_are_no_whole_ones():
    def between(self, x, idx):
        return x + torch.arange(0.5, idx.shape[1] + 0.5)[:, None]

    (rows,) = run(type("Model", (Base,), {"between": between})()).rows.values()
    assert isinstance(rows.table, torch.Tensor)
    assert rows.table[:3].tolist() == [0.5, 1.5, 2.5]


def test_limit_of_a_learned_table_without_an_assertion():
    model = type("Model", (Base,), {"between": learned_offset})()
    captured = capture(model)
    assert captured.limit is None
    assert longest_sequence(captured.graph, captured.length, captured.limit) == 62


def test_limit_of_positions_that_are_repeated_for_every_sequence():
    def repeated(self, x, idx):
        return x + self.wpe(torch.arange(idx.shape[1]).expand(idx.shape) + 3)

    captured = capture(type("Model", (Base,), {"between": repeated})())
    assert longest_sequence(captured.graph, captured.length, captured.limit) == 61


def test_limit_of_other_ways_to_look_up():
    def gathered(self, x, idx):
        places = torch.arange(idx.shape[1])[:, None].expand(-1, x.shape[-1])
        return x + self.wpe.weight.gather(0, places)

    def of_each_row(self, x, idx):
        places = torch.arange(idx.shape[1])[None, :, None].expand(x.shape)
        return x + self.wpe.weight[None].expand(idx.shape[0], -1, -1).gather(1, places)

    def with_a_second_index(self, x, idx):
        both = torch.stack((self.wpe.weight, -self.wpe.weight))
        return x + both[1, torch.arange(idx.shape[1])]

    def behind_another(self, x, idx):
        both = torch.stack((self.wpe.weight, -self.wpe.weight))
        return x + both[torch.ones(1, dtype=torch.long), torch.arange(idx.shape[1]) + 3]

    expected = {gathered: 64, of_each_row: 64, with_a_second_index: 64, behind_another: 61}
    for between, length in expected.items():
        captured = capture(type("Model", (Base,), {"between": between})())
        assert longest_sequence(captured.graph, captured.length, captured.limit) == length


def test_limit_of_positions_that_take_the_shape_of_something_else():
    shaped = {
        "ids": lambda n, x, idx: torch.arange(3, n + 3)[None].expand_as(idx),
        "a state": lambda n, x, idx: torch.arange(n) + torch.full_like(x[..., 0], 3).long(),
        "rows": lambda n, x, idx: idx.new_ones(idx.shape).cumsum(1) + 2,
    }
    for positions in shaped.values():

        def learned(self, x, idx, positions=positions):
            return x + self.wpe(positions(idx.shape[1], x, idx))

        captured = capture(type("Model", (Base,), {"between": learned})())
        assert longest_sequence(captured.graph, captured.length, captured.limit) == 61


def test_length_as_a_number_is_refused():
    model = type("Model", (Base,), {"between": length_as_a_number})()
    with pytest.raises(PortError, match=r"a number \(6\.08") as caught:
        run(model)
    reason = caught.value.reasons[0]
    assert reason.code is ReasonCode.DEPENDS_ON_LENGTH
    assert "# HERE" in linecache.getline(__file__, reason.location.line)


def test_a_table_that_changes_with_the_length_is_no_table():
    def stretched(self, x, idx):
        return x + self.wpe(torch.ones(idx.shape[1]).cumsum(0).flip(0).long() - 1)  # HERE

    model = type("Model", (Base,), {"between": stretched})()
    assert run(model).reasons


def newest(length):
    return torch.arange(length - 1, length)


def counted(length):
    return torch.arange(length).max()


def spread_out(length):
    return torch.linspace(0, length, C)


@pytest.mark.parametrize("number", [newest, counted, spread_out])
def test_rows_of_a_table_that_changes_with_the_length_are_no_rows(number):
    def scaled(self, x, idx):
        length = idx.shape[1]
        return x + (self.pe[0] * number(length).clamp(min=50))[:length]  # HERE

    def alone(self, x, idx):
        return x * number(idx.shape[1]).clamp(min=50)  # HERE

    for between in (scaled, alone):
        assert run(type("Model", (Base,), {"between": between})()).reasons


def test_rows_of_a_table_that_is_copied_for_every_sequence():
    def copied(self, x, idx):
        return x + self.pe.expand(idx.shape[0], -1, -1)[:, : idx.shape[1]]

    assert not run(type("Model", (Base,), {"between": copied})()).reasons


def test_positions_in_a_narrow_dtype_are_those_that_torch_counts():
    def halves(self, x, idx):
        return x + torch.arange(idx.shape[1], dtype=torch.bfloat16)[:, None]

    captured = capture(type("Model", (Base,), {"between": halves})())
    locality = analyse(captured.graph, Symbols(captured.batch, captured.length), 4200)
    (rows,) = locality.rows.values()
    assert torch.equal(rows.table, torch.arange(4200, dtype=torch.bfloat16))


def test_axes_of_a_folded_batch():
    model = type("Model", (Base,), {"between": folded})()
    locality = run(model)
    assert ((Axis.BATCH, Axis.TOKEN), (C,)) in locality.axes.values()
