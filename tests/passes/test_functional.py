"""In-place operations on views: replaced where nobody else sees the change, else refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fxport.capture.export import capture
from fxport.capture.inputs import InputKind, graph_input
from fxport.capture.memory import is_mutation
from fxport.errors import PortError, ReasonCode
from fxport.passes.functional import functionalise

aten = torch.ops.aten
LAYERS, VOCAB, WIDTH, HEADS = 4, 29, 24, 3
Body = Callable[[Tensor], Tensor]


class Model(nn.Module):
    """`body` is applied to a projection ``[B, T, 3 * WIDTH]`` in every layer."""

    def __init__(self, body: Body, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.body = body
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, VOCAB)
        self.to(dtype).requires_grad_(False)  # autograd forbids what is done to some views

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = x + self.body(layer(x))
        return self.head(x)


# --- replaced ------------------------------------------------------------------------------------


def one_of_three(x: Tensor) -> Tensor:
    q, k, v = x.chunk(3, -1)
    q *= 0.5
    return q * k + v


def through_views(x: Tensor) -> Tensor:
    q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in x.split(WIDTH, -1))
    q.mul_(0.5)
    k += 0.25
    return (q * k - v).transpose(1, 2).flatten(2)


def unbound(x: Tensor) -> Tensor:
    q, k, v = x.unflatten(-1, (3, WIDTH)).unbind(2)
    v.clamp_(min=-0.1)
    return q + k * v


def twice(x: Tensor) -> Tensor:
    q, k, v = x.chunk(3, -1)
    q *= 0.5
    q += k
    return q * v


def base_read_before(x: Tensor) -> Tensor:
    total = x.sum(-1, keepdim=True)
    q = x[..., :WIDTH]
    q *= 0.5
    return q + total


def filled(x: Tensor) -> Tensor:
    table = torch.zeros(WIDTH).double().fill_(0.5)  # of the same dtype it would be the same tensor
    return x[..., :WIDTH] * table.to(x.dtype).fill_(0.25)


def whole_slice(x: Tensor) -> Tensor:
    y = x[..., :WIDTH] * 2.0
    y[:, -x.shape[1] :] += torch.linspace(0.0, 1.0, WIDTH, dtype=x.dtype)
    return y


def overwritten(x: Tensor) -> Tensor:
    """The copy has what its source was, and keeps its own dtype."""
    y, z = x[..., :WIDTH] * 2.0, (x[..., :WIDTH] > 0).long()
    y[:] = z
    z += 1
    return y / z


def base_read_after(x: Tensor) -> Tensor:
    q = x[..., :WIDTH]
    q *= 0.5
    return q + x[..., WIDTH : 2 * WIDTH]


def all_but_the_first(x: Tensor) -> Tensor:
    """Gemma 3n: several streams in one tensor, of which all but one are added to."""
    y = torch.stack(x.chunk(3, -1))
    y[1:] += y[0].clone().tanh()
    return y[0] * y[1] + y[2]


def one_entry(x: Tensor) -> Tensor:
    y = x[..., :WIDTH] * 2.0
    y[..., 3] = 0.5
    y[..., -1] = y[..., 0] + y[..., 3]
    return y.sin()


def spread(x: Tensor) -> Tensor:
    y = x[..., :WIDTH] * 2.0
    y[..., 2:5] = torch.linspace(0.0, 1.0, 3, dtype=x.dtype)
    return y


def part_of_a_part(x: Tensor) -> Tensor:
    y = x.unflatten(-1, (3, WIDTH)).contiguous() * 1.5
    q = y[..., 1, :]
    q[..., :5] *= 0.5
    return y[..., 1, :] * q + y[..., 0, :] + y.sum(-2)


def reshaped(x: Tensor) -> Tensor:
    """A mixture of experts adds to the rows of ``out.view(-1, WIDTH)``, for one after the other."""
    q, k, v = x.reshape(-1, 3 * WIDTH).chunk(3, -1)
    out = torch.zeros_like(x[..., :WIDTH])
    out.view(-1, WIDTH).add_(q * k)
    total = out.sum(-1, keepdim=True)
    out.view(-1, WIDTH).add_(v)
    return out * total


def reshaped_once(x: Tensor) -> Tensor:
    """.. through one view, kept; and what is read below another one."""
    q, k, v = x.reshape(-1, 3 * WIDTH).chunk(3, -1)
    out = torch.zeros_like(x[..., :WIDTH])
    flat = out.view(-1, WIDTH)
    heads = flat.view(-1, HEADS, WIDTH // HEADS)
    flat.add_(q * k)
    total = out.sum(-1, keepdim=True)
    flat.mul_(v + 1.0)
    return out * total + heads.flatten(1).view_as(out)


REPLACED = [
    reshaped,
    reshaped_once,
    one_of_three,
    through_views,
    unbound,
    twice,
    base_read_before,
    filled,
    whole_slice,
    overwritten,
    base_read_after,
    all_but_the_first,
    one_entry,
    spread,
    part_of_a_part,
]


def mutations(gm: fx.GraphModule) -> Counter[Any]:
    return Counter(n.target for n in gm.graph.nodes if is_mutation(n))


def logits(gm: fx.GraphModule, model: nn.Module, ids: Tensor) -> Tensor:
    given = []
    for node in gm.graph.find_nodes(op="placeholder"):
        source = graph_input(node)
        learned = source.kind is InputKind.PARAMETER
        stored = model.get_parameter(source.name).detach() if learned else source.value
        given.append(ids if source.kind is InputKind.DATA else stored)
    found: Any = gm(*given)
    return found[0] if isinstance(found, tuple) else found


@pytest.mark.parametrize("body", REPLACED, ids=lambda f: f.__name__)
def test_replaced(body: Body) -> None:
    torch.manual_seed(0)
    model = Model(body).eval()
    gm = capture(model).graph
    assert mutations(gm).total() >= LAYERS
    functionalise(gm)
    assert not mutations(gm)
    for shape in ((2, 7), (3, 3)):
        ids = torch.randint(0, VOCAB, shape)
        torch.testing.assert_close(logits(gm, model, ids), model(ids), rtol=1e-12, atol=1e-12)


def test_what_is_around_a_written_part_is_taken_over_by_cat() -> None:
    gm = capture(Model(all_but_the_first)).graph
    functionalise(gm)
    assert Counter(n.target for n in gm.graph.nodes)[aten.cat.default] >= LAYERS
    gm = capture(Model(one_of_three)).graph  # the other pieces are apart: nothing is joined
    functionalise(gm)
    assert not Counter(n.target for n in gm.graph.nodes)[aten.cat.default]


def test_a_filled_tensor_is_a_constant() -> None:
    gm = capture(Model(filled)).graph
    functionalise(gm)
    count = Counter(n.target for n in gm.graph.nodes)
    assert count[aten.full_like.default] == 2 * LAYERS and not count[aten.fill.Scalar]


def test_the_dtype_stays() -> None:
    """``bf16.mul_(f32)`` gives bf16, ``bf16 * f32`` does not."""
    table = torch.linspace(0.5, 2.0, 3 * WIDTH)

    def body(x: Tensor) -> Tensor:
        y = x + 1
        y.mul_(table)
        return y[..., :WIDTH] * y[..., -WIDTH:]

    torch.manual_seed(0)
    model = Model(body, torch.bfloat16).eval()
    gm = capture(model).graph
    functionalise(gm)
    products = [n for n in gm.graph.nodes if n.target is aten.mul.Tensor]
    kept = [n for n in products if any(u.target is aten.to.dtype for u in n.users)]
    assert len(products) == 2 * LAYERS and len(kept) == LAYERS
    assert not mutations(gm)


# --- refused -------------------------------------------------------------------------------------


def overlapping(x: Tensor) -> Tensor:
    q, k = x[..., : WIDTH + 1], x[..., WIDTH : 2 * WIDTH]
    q *= 0.5
    return q[..., :WIDTH] + k


def an_earlier_part_read_after(x: Tensor) -> Tensor:
    y = torch.stack(x.chunk(3, -1))
    before = y[1]
    y[1:] *= 0.5
    return before * y[0] + y[2]


def earlier_view_read_after(x: Tensor) -> Tensor:
    q, k, v = x.chunk(3, -1)
    heads = q.unflatten(-1, (HEADS, -1))
    q *= 0.5
    return heads.flatten(2) * k + v


def the_same_piece(x: Tensor) -> Tensor:
    q, k, v = x.chunk(3, -1)
    again = x.chunk(3, -1)[0]
    q *= 0.5
    return again * k + v


def part_of_it(x: Tensor) -> Tensor:
    y = x[..., :WIDTH] * 2.0
    y[:, 1:] *= 0.5
    return y


def reshaped_beside_a_part(x: Tensor) -> Tensor:
    out = x[..., :WIDTH] + 1
    first = out[..., :1]
    flat = out.view(-1, WIDTH)
    flat *= 0.5
    return out * first


REFUSED = [
    reshaped_beside_a_part,
    overlapping,
    an_earlier_part_read_after,
    earlier_view_read_after,
    the_same_piece,
    part_of_it,
]


@pytest.mark.parametrize("body", REFUSED, ids=lambda f: f.__name__)
def test_refused(body: Body) -> None:
    gm = capture(Model(body)).graph
    with pytest.raises(PortError) as caught:
        functionalise(gm)
    assert {r.code for r in caught.value.reasons} == {ReasonCode.MUTATED_IN_PLACE}
    lines = [r.location.source if r.location else "" for r in caught.value.reasons]
    assert len(lines) >= LAYERS and all("*= 0.5" in line for line in lines)
