"""Parts of forward that run under `torch.utils.checkpoint` do so in a divided model, too."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)
from transformers import LlamaConfig, LlamaForCausalLM

import fxport
from fxport import ParallelContext
from fxport.capture.checkpoints import CheckpointCall
from fxport.parallel.checkpointed import Checkpointed
from fxport.parallel.modules import CopyTo, ReduceFrom
from fxport.parallel.plan import Plan
from fxport.passes.tensor_parallel.checkpoints import checkpoint_again
from tests.parallel import models
from tests.parallel.models import VOCAB, Block, Decoder, PackedGlu, Separate
from tests.parallel.simulation import Ranks, compare, make_once, randomised
from tests.parallel.test_dropout import Attention, Mlp

Run = Callable[[nn.Module, Tensor], Tensor]
plain = functools.partial(checkpoint, use_reentrant=False)


def halves(block: nn.Module, x: Tensor) -> Tensor:
    """Two calls a block, of functions; what is added stands outside."""
    x = x + plain(lambda y: block.attention(block.norm1(y)), x)
    return x + plain(lambda y: block.mlp(block.norm2(y)), x)


def nested(block: nn.Module, x: Tensor) -> Tensor:
    return plain(functools.partial(halves, block), x)


WAYS: dict[str, Run] = {
    "block": plain,
    "re-entrant": functools.partial(checkpoint, use_reentrant=True),
    "halves": halves,
    "nested": nested,
}


class Saving(Decoder):
    """Two blocks; every one of them by `run`."""

    def __init__(self, run: Run, attention=Separate, mlp=PackedGlu) -> None:
        super().__init__(attention, mlp)
        self.blocks = self.blocks[:2]
        self.run = run

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = self.run(block, x)
        return self.head(self.norm(x))


def without(block: nn.Module, x: Tensor) -> Tensor:
    return block(x)


def batch(step: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, (2, 29), generator=torch.Generator().manual_seed(step))


def saved(module: nn.Module) -> int:
    """Bytes kept for backward, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    found: dict[int, int] = {}

    def pack(value: Tensor) -> Tensor:
        found[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    with saved_tensors_hooks(pack, lambda value: value):
        module(batch())
    return sum(size for at, size in found.items() if at not in own)


def parts(module: nn.Module) -> list[Checkpointed]:
    return [m for m in module.modules() if isinstance(m, Checkpointed)]


@functools.cache
def kept_without() -> int:
    return saved(fxport.parallelize(randomised(Saving(without)), ParallelContext(0, 1)))


@pytest.mark.parametrize(("way", "calls"), [("block", 2), ("nested", 6)])
def test_what_is_not_kept(way: str, calls: int) -> None:
    """What eager mode keeps of the model itself, and what it needs once more for the views."""
    model = randomised(Saving(WAYS[way]))
    module = fxport.parallelize(model, ParallelContext(0, 1))
    assert len(parts(module)) == calls
    assert saved(module) <= saved(randomised(Saving(plain))) * 1.1 < kept_without() / 3


@pytest.mark.parametrize(
    ("way", "world_size", "attention"),
    [
        ("block", 2, Separate),
        ("re-entrant", 4, Separate),
        ("halves", 3, functools.partial(Separate, 6, 2, "full")),
        ("nested", 2, functools.partial(Separate, 5, 1)),
    ],
)
def test_outputs_and_gradients(way: str, world_size: int, attention: type[nn.Module]) -> None:
    model = randomised(Saving(WAYS[way], attention))
    (ranks,) = make_once(model, world_size)
    assert all(len(parts(m)) == len(parts(ranks.modules[0])) >= 2 for m in ranks.modules)
    errors = compare(model, ranks)
    assert errors.output < 1e-12 and errors.gradient < 1e-11, errors


def test_collectives_are_in_the_parts_that_ran_them() -> None:
    """Two reductions a block forward; backward runs one of them again, and its own two."""
    (ranks,) = make_once(randomised(Saving(plain)), 2)
    module = ranks.modules[0]
    called = [m for m in _called(module) if isinstance(m, ReduceFrom | CopyTo)]
    assert [sum(isinstance(m, ReduceFrom) for m in _called(p.body)) for p in parts(module)] == [
        2,
        2,
    ]
    assert sum(isinstance(m, CopyTo) for p in parts(module) for m in _called(p.body)) == 4
    assert sorted(type(m).__name__ for m in called) == ["CopyTo", "ReduceFrom"]  # table and head
    group = ranks.contexts[0].group

    def work(rank: int) -> None:
        loss = ranks.modules[rank](batch()).sum()
        if rank == 0:
            forward.append(len(group.calls))
        loss.backward()

    forward: list[int] = []
    group.run(work)
    assert forward == [1 + 2 * 2 + 1]  # table, blocks, logits
    assert len(group.calls) - forward[0] == 1 + 2 * (2 + 1)


def shifted(block: nn.Module, x: Tensor) -> Tensor:
    """From the attention to the first half of the MLP: it ends in every rank's own work."""

    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x + block.attention(block.norm1(x))
        return x, block.mlp.up(block.norm2(x))

    x, y = plain(both, x)
    return x + block.mlp.down(F.gelu(y))


def test_a_part_that_ends_in_own_work_runs_all_its_collectives_again() -> None:
    """A rank may keep more there than another, and would stop later."""
    model = randomised(Saving(shifted, mlp=models.Mlp))
    (ranks,) = make_once(model, 2)
    assert [p.early_stop for p in parts(ranks.modules[0])] == [False, False]
    errors = compare(model, ranks)
    assert errors.output < 1e-12 and errors.gradient < 1e-11, errors


def _called(gm: fx.GraphModule) -> list[nn.Module]:
    return [gm.get_submodule(str(n.target)) for n in gm.graph.nodes if n.op == "call_module"]


def test_dropout_is_the_same_when_it_is_computed_again() -> None:
    """For two ranks as for one, and as without checkpoints."""
    model = randomised(Saving(plain, Attention, Mlp)).train()
    (ranks,) = make_once(model, 2)
    assert len(parts(ranks.modules[0])) == 2
    found = ranks.contexts[0].group.run(functools.partial(_step, ranks))
    full = fxport.gather_state_dict(ranks.modules[0].plan, [gradients for _, gradients in found])
    for run in (plain, without):
        model.run = run
        wanted = _step(make_once(model, 1)[0], 0)
        torch.testing.assert_close(found[0][0], wanted[0], rtol=1e-10, atol=1e-12)
        for name, value in wanted[1].items():
            torch.testing.assert_close(full[name], value, rtol=1e-9, atol=1e-10, msg=name)


def _step(ranks: Ranks, rank: int) -> tuple[Tensor, dict[str, Tensor]]:
    module = ranks.modules[rank]
    for part in module.modules():
        if type(part).__name__ == "StepSeed":  # ranks are threads here, with one generator
            part.forward = lambda tokens: torch.tensor([1234567])
    y = module(batch())
    y.square().sum().backward()
    return y.detach(), {n: p.grad for n, p in module.named_parameters()}


class Sequential(Saving):
    def forward(self, ids: Tensor) -> Tensor:
        x = checkpoint_sequential(self.blocks, 2, self.embed(ids), use_reentrant=False)
        return self.head(self.norm(x))


def test_a_sequence_of_segments() -> None:
    """The last segment is the one that torch keeps."""
    model = Sequential(without)
    del model.positions
    model.blocks = nn.Sequential(*model.blocks, Block(Separate(), PackedGlu()))
    module = fxport.parallelize(randomised(model), ParallelContext(0, 1))
    assert len(parts(module)) == 1
    torch.testing.assert_close(module(batch()), model(batch()), rtol=1e-10, atol=1e-12)


def choosing(block: nn.Module, x: Tensor) -> Tensor:
    def policy(ctx: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
        return CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    return plain(block, x, context_fn=contexts)


def test_a_choice_of_what_is_kept_is_refused() -> None:
    model = randomised(Saving(choosing))
    with pytest.raises(fxport.FxportError, match=r"models\.py:\d+.*context_fn"):
        fxport.parallelize(model, ParallelContext(0, 2))


def in_training(block: nn.Module, x: Tensor) -> Tensor:
    return plain(block, x) if block.training else block(x)


def test_checkpoints_in_training_mode_only() -> None:
    model = randomised(Saving(in_training))
    module = fxport.parallelize(model, ParallelContext(0, 1))
    assert not parts(module)
    with pytest.raises(fxport.FxportError, match=r"keeps other activations.*model.train\(\)"):
        module.train()
    module = fxport.parallelize(model.train(), ParallelContext(0, 1))
    assert len(parts(module)) == 2
    module.eval()


def test_operations_of_two_calls_in_each_other_are_refused() -> None:
    """No trace makes such a graph; a pass that moved an operation could."""
    graph = fx.Graph()
    value = graph.placeholder("x")
    for call in (0, 1, 0):
        value = graph.call_function(torch.neg, (value,))
        value.meta["custom"] = {"fxport_checkpoints": (CheckpointCall(call, False),)}
    graph.output(value)
    with pytest.raises(fxport.FxportError, match="between operations of another call"):
        checkpoint_again(fx.GraphModule(nn.Module(), graph), Plan(1, (), (), ()))


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, use_cache=False).logits


def test_a_hugging_face_model_as_it_says_so() -> None:
    """Its mask asks for packed documents; with flash attention only what enters a block is kept."""
    sizes = {"vocab_size": VOCAB, "hidden_size": 24, "intermediate_size": 44}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    llama = LlamaForCausalLM(LlamaConfig(**sizes, **heads, head_dim=8))
    llama.gradient_checkpointing_enable({"use_reentrant": False})
    model = randomised(Logits(llama)).train()
    (ranks,) = make_once(model, 2)
    module = ranks.modules[0]
    assert not module.plan.replicated and len(parts(module)) == 2
    attention = torch.ops.fxport.attention.default
    assert [sum(n.target is attention for n in p.body.graph.nodes) for p in parts(module)] == [1, 1]
    errors = compare(model, ranks)  # its norms are float32
    assert errors.output < 1e-6 and errors.gradient < 1e-5, errors


def test_compiled() -> None:
    """With Dynamo and AOTAutograd, which know checkpoints; `test_training` goes on to Inductor."""
    model = randomised(Saving(plain))
    module = fxport.parallelize(model, ParallelContext(0, 1))
    run = torch.compile(module, backend="aot_eager", fullgraph=True)
    assert saved(run) <= saved(model) * 1.1 < kept_without() / 3
    wanted = torch.autograd.grad(model(batch()).square().sum(), list(model.parameters()))
    found = torch.autograd.grad(run(batch()).square().sum(), list(module.parameters()))
    names = [n for n, _ in module.named_parameters()]
    assert names == [n for n, _ in model.named_parameters()]
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)
