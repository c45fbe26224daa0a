"""Products with the rows of a matrix become linears; others stay."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from fxport.capture.export import capture
from fxport.capture.inputs import InputKind, graph_input
from fxport.passes.functional import functionalise
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
OTHERS: dict[str, Product] = {
    "columns": lambda x, w: x @ w,
    "permuted to itself": lambda x, w: x @ w.permute(0, 1),
    "transposed to itself": lambda x, w: x @ w.transpose(1, 1),
    "einsum with columns": lambda x, w: torch.einsum("btc,cv->btv", x, w),
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


def respelled(product: Product) -> tuple[float, int, int]:
    """(error, linears before, linears after); a square matrix, so that no shape tells."""
    torch.manual_seed(0)
    model = Model(product).double()
    gm = capture(model).graph
    functionalise(gm)
    before = _linears(gm)
    one_spelling(gm)
    ids = torch.randint(0, VOCAB, (2, 5))
    state = dict(model.named_parameters())
    inputs = [graph_input(n) for n in gm.graph.nodes if n.op == "placeholder"]
    with torch.no_grad():
        found = gm(*(ids if i.kind is InputKind.DATA else state[i.name] for i in inputs))
        found = found[0] if isinstance(found, (tuple, list)) else found
        return float((found - model(ids)).abs().max()), before, _linears(gm)


def _linears(gm: fx.GraphModule) -> int:
    return sum(n.target is aten.linear.default for n in gm.graph.nodes)


@pytest.mark.parametrize("name", ROWS)
def test_products_with_rows(name: str) -> None:
    error, before, after = respelled(ROWS[name])
    assert (before, after) == (1, 2) and error < 1e-12


@pytest.mark.parametrize("name", OTHERS)
def test_others_stay(name: str) -> None:
    error, before, after = respelled(OTHERS[name])
    assert (before, after) == (1, 1) and error < 1e-12
