"""Products with the rows of a matrix become linears; others stay."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxport.capture.export import capture
from fxport.capture.inputs import InputKind, graph_input
from fxport.passes.functional import functionalise
from fxport.passes.tensor_parallel.joined import join_projections
from fxport.passes.tensor_parallel.spellings import one_spelling

aten = torch.ops.aten
VOCAB, WIDTH = 19, 12
Product = Callable[[Tensor, Tensor], Tensor]

ROWS: dict[str, Product] = {
    "T": lambda x, w: x @ w.T,
    "t": lambda x, w: torch.matmul(x, w.t()),
    "mT": lambda x, w: x @ w.mT,
    "transpose": lambda x, w: x @ w.transpose(-1, 0),
    "permute": lambda x, w: x @ w.permute(1, 0),
    "einsum": lambda x, w: torch.einsum("btc,vc->btv", x, w),
    "einsum of any rank": lambda x, w: torch.einsum("...c,vc->...v", x, w),
    "einsum of the turned one": lambda x, w: torch.einsum("btc,cv->btv", x, w.T),
}
ROWS |= {
    "convolution": lambda x, w: F.conv1d(x.mT, w.unsqueeze(2)).mT,
    "convolution with a bias": lambda x, w: F.conv1d(x.mT, w.unsqueeze(2), w[0]).mT,
}
OTHERS: dict[str, Product] = {
    "columns": lambda x, w: x @ w,
    "permuted to itself": lambda x, w: x @ w.permute(0, 1),
    "transposed to itself": lambda x, w: x @ w.transpose(1, 1),
    "einsum with columns": lambda x, w: torch.einsum("btc,cv->btv", x, w),
    "convolution of groups": lambda x, w: F.conv1d(x.mT, w[:, :6].unsqueeze(2), groups=2).mT,
    "convolution with steps": lambda x, w: (
        F.conv1d(x.mT.repeat_interleave(2, 2), w.unsqueeze(2), stride=2).mT
    ),
    "convolution over tokens": lambda x, w: (
        F.conv1d(F.pad(x.mT, (1, 0)), torch.stack((w, w.T), 2)).mT
    ),
    "another order": lambda x, w: torch.einsum("btc,vc->bvt", x, w).transpose(1, 2),
}


class Model(nn.Module):
    def __init__(self, product: Product) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.square = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.head = nn.Linear(WIDTH, VOCAB)
        self.product = product

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.product(self.embed(ids), self.square))


def respelled(product: Product) -> tuple[float, int, int, fx.GraphModule]:
    """(error, linears before and after, the graph); a square matrix, so that no shape tells."""
    torch.manual_seed(0)
    model = Model(product).double()
    gm = capture(model).graph
    functionalise(gm)
    before = _linears(gm)
    one_spelling(gm)
    join_projections(gm)
    ids = torch.randint(0, VOCAB, (2, 5))
    state = dict(model.named_parameters())
    inputs = [graph_input(n) for n in gm.graph.nodes if n.op == "placeholder"]
    with torch.no_grad():
        found = gm(*(ids if i.kind is InputKind.DATA else state[i.name] for i in inputs))
        found = found[0] if isinstance(found, (tuple, list)) else found
        return float((found - model(ids)).abs().max()), before, _linears(gm), gm


def _linears(gm: fx.GraphModule) -> int:
    return sum(n.target is aten.linear.default for n in gm.graph.nodes)


@pytest.mark.parametrize("name", ROWS)
def test_products_with_rows(name: str) -> None:
    error, before, after, _ = respelled(ROWS[name])
    assert (before, after) == (1, 2) and error < 1e-12


@pytest.mark.parametrize("name", OTHERS)
def test_others_stay(name: str) -> None:
    error, before, after, _ = respelled(OTHERS[name])
    assert (before, after) == (1, 1) and error < 1e-12


SUMS: dict[str, Product] = {
    "one sum": lambda x, w: torch.einsum(
        "bthd,hdc->bthc", x.view(*x.shape[:2], 3, 4), w.view(3, 4, WIDTH)
    ).sum(2),
    "from the end, any rank": lambda x, w: torch.einsum(
        "...hd,hdc->...hc", x.view(*x.shape[:2], 3, 4), w.view(3, 4, WIDTH)
    ).sum(-2),
}
OTHER_SUMS: dict[str, Product] = {
    "of what only the weight has": lambda x, w: (
        torch.einsum("btc,cvn->btvn", x, w.view(12, 2, 6)).sum(2).repeat(1, 1, 2)
    ),
    "used otherwise, too": lambda x, w: (
        (y := torch.einsum("bthd,hdc->bthc", x.view(*x.shape[:2], 3, 4), w.view(3, 4, WIDTH))).sum(
            2
        )
        + y[:, :, 0]
    ),
    "not of a product": lambda x, w: (x @ w).view(*x.shape[:2], 3, 4).sum(2).repeat(1, 1, 3),
}


def _sums(gm: fx.GraphModule) -> int:
    return sum(n.target is aten.sum.dim_IntList for n in gm.graph.nodes)


@pytest.mark.parametrize(("name", "left"), [*((n, 0) for n in SUMS), *((n, 1) for n in OTHER_SUMS)])
def test_sums_over_what_both_operands_have(name: str, left: int) -> None:
    error, *_, gm = respelled({**SUMS, **OTHER_SUMS}[name])
    assert _sums(gm) == left and error < 1e-12


CHOSEN: dict[str, Product] = {
    "something or nothing added": lambda x, w: torch.where(x[..., :1] > 0, x + x @ w, x),
    "the other way round": lambda x, w: torch.where(x[..., :1] > 0, x @ w + x, x),
}
NOT_CHOSEN: dict[str, Product] = {
    "another base": lambda x, w: torch.where(x[..., :1] > 0, x + x @ w, x @ w),
    "added twice": lambda x, w: torch.where(x[..., :1] > 0, torch.add(x, x @ w, alpha=2), x),
    "the base itself": lambda x, w: torch.where(x[..., :1] > 0, x + x, x),
    "used otherwise, too": lambda x, w: torch.where(x > 0, (y := x + x @ w), x) * y,
}


@pytest.mark.parametrize("name", [*CHOSEN, *NOT_CHOSEN])
def test_sums_that_are_chosen(name: str) -> None:
    error, *_, gm = respelled({**CHOSEN, **NOT_CHOSEN}[name])
    moved = any(n.target is aten.where.ScalarOther for n in gm.graph.nodes)
    assert moved == (name in CHOSEN) and error < 1e-12


NAMED: dict[str, Product] = {
    "permuted by names": lambda x, w: torch.einsum("bti->bit", x @ w).mT,
    "split into parts of two sizes": lambda x, w: _joined(*(x @ w).tensor_split(5, -1)[::-1]),
    "split at places": lambda x, w: _joined(*(x @ w).tensor_split([3, 4], -1)[::-1]),
    "spread": lambda x, w: (x @ w)[:, :, None].broadcast_to(*x.shape[:2], 2, WIDTH).sum(2),
}
OF_OTHER_MEANING: dict[str, Product] = {
    "summed by names": lambda x, w: x @ w + torch.einsum("bti->bt", x)[..., None],
    "the diagonal": lambda x, w: x @ w + torch.einsum("bii->bi", x[:, :1, :1])[..., None],
    "split at places, some twice": lambda x, w: _joined(*(x @ w).tensor_split([8, 4, 8], -1))[
        ..., :WIDTH
    ],
}
_RESPELLED = {aten.einsum.default, aten.tensor_split.sections, aten.tensor_split.indices,
              aten.broadcast_to.default}  # fmt: skip


@pytest.mark.parametrize("name", [*NAMED, *OF_OTHER_MEANING])
def test_dimensions_by_name_and_parts(name: str) -> None:
    error, *_, gm = respelled({**NAMED, **OF_OTHER_MEANING}[name])
    left = any(n.target in _RESPELLED for n in gm.graph.nodes)
    assert left == (name in OF_OTHER_MEANING) and error < 1e-12


def _joined(*parts: Tensor) -> Tensor:
    return torch.cat(parts, -1)


JOINED: dict[str, Product] = {
    "slices, the last first": lambda x, w: _joined(F.linear(x, w[5:]), F.linear(x, w[:5])),
    "split": lambda x, w: _joined(*(F.linear(x, part) for part in w.split(4))),
    "chunks of two sizes": lambda x, w: _joined(*(F.linear(x, p) for p in w.chunk(5))),
}
APART: dict[str, Product] = {
    "not all rows": lambda x, w: _joined(F.linear(x, w[:5]), F.linear(x, w[4:11])),
    "rows twice": lambda x, w: _joined(
        F.linear(x, w[:8]), F.linear(x, w[8:]) + F.linear(x, w[4:8])
    ),
    "other inputs": lambda x, w: _joined(F.linear(x, w[:6]), F.linear(x + 1, w[6:])),
    "columns": lambda x, w: F.linear(x[..., :6], w[:, :6]) + F.linear(x[..., :6], w[:, 6:]),
    "a bias of other rows": lambda x, w: _joined(
        F.linear(x, w[:6], w[0, 6:]), F.linear(x, w[6:], w[0, :6])
    ),
}


@pytest.mark.parametrize("name", [*JOINED, *APART])
def test_parts_of_one_weight(name: str) -> None:
    error, before, after, _ = respelled({**JOINED, **APART}[name])
    assert error < 1e-12 and after == (before if name in APART else 2)
