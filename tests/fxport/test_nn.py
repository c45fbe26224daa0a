"""The building blocks on several ranks, their refusals, and how builders are found."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn

import fxport
from fxport import ParallelContext
from fxport.nn import (
    ColumnParallelLinear,
    GenericTransformerForCausalLM,
    RowParallelLinear,
    TransformerConfig,
    VLLMFlashAttention,
    VocabParallelEmbedding,
    full_state_dict,
    save_model,
)
from fxport.nn.checkpoint import fill_model
from tests.test_generic_model_support import SIZES, build, double_attention

# -- ranks -------------------------------------------------------------------------------------


def gather_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Whole gradients, put together like the parameters themselves."""
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.copy_(parameter.grad)
    return full_state_dict(model)


@pytest.mark.parametrize(("ranks", "kv_heads"), [(2, 2), (4, 2), (4, 1), (4, 4), (8, 2)])
@pytest.mark.parametrize("tied", [False, True])
def test_ranks_give_the_gradients_of_one(ranks: int, kv_heads: int, tied: bool) -> None:
    sizes = TransformerConfig(97, 48, 72, 4, 8, kv_heads, tie_word_embeddings=tied)
    contexts = ParallelContext.simulated(ranks)
    torch.manual_seed(4)
    whole = GenericTransformerForCausalLM(sizes).double()
    ids = torch.randint(97, (3, 9))
    parts = [GenericTransformerForCausalLM(sizes, context).double() for context in contexts]
    for part in parts:
        fill_model(part, {n: v.detach() for n, v in whole.state_dict().items()}.items())
    for _ in range(3):
        F.cross_entropy(whole(ids).flatten(0, 1), ids.flatten()).backward()

    def work(rank: int) -> dict[str, Tensor]:
        for _ in range(3):
            F.cross_entropy(parts[rank](ids).flatten(0, 1), ids.flatten()).backward()
        return gather_gradients(parts[rank])

    expected = {n: p.grad for n, p in whole.named_parameters(remove_duplicate=False)}
    for found in contexts[0].group.run(work):
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[name], msg=lambda m, n=name: f"{n}: {m}")


def test_two_reductions_a_block_in_each_direction() -> None:
    """What is shared costs one: q, k and v's input, gate and up's input."""
    sizes = TransformerConfig(97, 48, 72, 4, 6, 2)
    contexts = ParallelContext.simulated(2)
    parts = [GenericTransformerForCausalLM(sizes, context) for context in contexts]
    ids = torch.arange(9)[None]
    simulator = contexts[0].group
    logits = simulator.run(lambda rank: parts[rank](ids))
    forward = [kind for kind, _ in simulator.calls]
    # the embedding, 2 a block; the logits
    assert forward == ["all_reduce"] * (1 + 2 * 4) + ["all_gather"]
    simulator.calls.clear()
    simulator.run(lambda rank: logits[rank].sum().backward())
    assert [kind for kind, _ in simulator.calls] == ["all_reduce"] * (2 * 4 + 1)  # and the head


def test_same_seed_same_model_on_any_number_of_ranks() -> None:
    contexts = ParallelContext.simulated(2)
    torch.manual_seed(5)
    whole = GenericTransformerForCausalLM(SIZES).state_dict()
    parts = []
    for context in contexts:
        torch.manual_seed(5)
        parts.append(GenericTransformerForCausalLM(SIZES, context))
    for state in contexts[0].group.run(lambda rank: full_state_dict(parts[rank])):
        assert all(torch.equal(state[name], value) for name, value in whole.items())


def _linears(rank: int, address: str, results: Any) -> None:
    """In a process of its own: an MLP with biases between embedding and head, over gloo."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    context = ParallelContext.from_distributed()
    model = small(context)
    ids = torch.arange(14).view(2, 7)
    output = model(ids)
    (output * torch.arange(11.0, dtype=torch.float64)).sum().backward()
    state = {name: value.numpy() for name, value in gather_gradients(model).items()}
    results.put((rank, output.detach().numpy(), state))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def small(context: ParallelContext) -> nn.Sequential:
    torch.manual_seed(6)
    return nn.Sequential(
        VocabParallelEmbedding(15, 6, parallel_context=context),
        ColumnParallelLinear(6, 10, parallel_context=context),
        nn.Tanh(),
        RowParallelLinear(10, 8, parallel_context=context),
        ColumnParallelLinear(8, 12, gather_output=True, parallel_context=context),
        RowParallelLinear(12, 11, input_is_parallel=False, parallel_context=context),
    ).double()


def test_linears_over_two_processes(tmp_path: Path) -> None:
    spawn = mp.get_context("spawn")
    results = spawn.Queue()
    address = f"file://{tmp_path}/rendezvous"
    workers = [spawn.Process(target=_linears, args=(r, address, results)) for r in range(2)]
    for worker in workers:
        worker.start()
    found = [results.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    whole = small(ParallelContext(0, 1))
    expected = whole(torch.arange(14).view(2, 7))
    (expected * torch.arange(11.0, dtype=torch.float64)).sum().backward()
    for _, output, gradients in found:
        torch.testing.assert_close(torch.from_numpy(output), expected.detach())
        for name, parameter in whole.named_parameters():
            torch.testing.assert_close(torch.from_numpy(gradients[name]), parameter.grad)


def test_biases_on_ranks_that_share_heads() -> None:
    """Biased layers on 4 simulated ranks; two ranks hold each key/value head."""
    contexts = ParallelContext.simulated(4)

    class Block(nn.Module):
        def __init__(self, context: ParallelContext) -> None:
            super().__init__()
            torch.manual_seed(7)
            self.attention = VLLMFlashAttention(24, 4, 2, 8, bias=True, parallel_context=context)
            self.up = ColumnParallelLinear(24, 20, parallel_context=context)
            self.down = RowParallelLinear(20, 11, parallel_context=context)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.up(self.attention(x)).tanh())

    x = torch.randn(2, 7, 24, dtype=torch.float64)
    whole = Block(ParallelContext(0, 1)).double()
    parts = [Block(context).double() for context in contexts]
    expected = whole(x)
    expected.square().sum().backward()

    def work(rank: int) -> tuple[Tensor, dict[str, Tensor]]:
        output = parts[rank](x)
        output.square().sum().backward()
        return output, gather_gradients(parts[rank])

    for output, gradients in contexts[0].group.run(work):
        torch.testing.assert_close(output, expected)
        for name, parameter in whole.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad)


# -- refusals ----------------------------------------------------------------------------------


def test_refusals() -> None:
    two, three = ParallelContext.simulated(2)[0], ParallelContext.simulated(3)[0]
    for context, heads, kv_heads in [(two, 3, 3), (three, 6, 2), (two, 6, 4)]:
        with pytest.raises(fxport.FxportError, match="divide"):
            VLLMFlashAttention(48, heads, kv_heads, parallel_context=context)
    with pytest.raises(fxport.FxportError, match="7 output features do not divide over 2 ranks"):
        ColumnParallelLinear(5, 7, parallel_context=two)
    with pytest.raises(fxport.FxportError, match=r"\[B, T, C\]"):
        double_attention()(
            torch.zeros(1, 4, 48).double(), cu_seqlens=torch.tensor([0, 4], dtype=torch.int32)
        )


def test_checkpoint_refusals(tmp_path: Path) -> None:
    model = GenericTransformerForCausalLM(SIZES)
    state = {n: v.detach() for n, v in model.state_dict().items()}
    for changed, words in [
        ({**state, "other.weight": torch.zeros(2)}, "`other.weight`, which the model does not"),
        ({**state, "norm.weight": torch.zeros(47)}, r"`norm.weight` has shape \(47,\)"),
        ({n: v for n, v in state.items() if n != "norm.weight"}, "no values for `norm.weight`"),
    ]:
        with pytest.raises(fxport.SavedPortError, match=words):
            fill_model(model, changed.items())
    with pytest.raises(fxport.FxportError, match="fxport_builder"):
        save_model(model, tmp_path / "saved", SIZES.to_dict())


def test_registration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fxport.nn.registry import find_builder

    with pytest.raises(fxport.FxportError, match=r"no model 'Unknown'.*FXPORT_MODELS"):
        find_builder("Unknown")
    (tmp_path / "named_by_environment.py").write_text(
        "import fxport\n\ndef make(config, context): ...\n\nfxport.register_model('Named', make)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("FXPORT_MODELS", "named_by_environment")
    assert find_builder("Named").__name__ == "make"
    with pytest.raises(fxport.FxportError, match="registered already"):
        fxport.register_model("Named", build)


def test_two_files_with_a_function_of_one_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second must not take the first one's place without a word; the same again may."""
    for name in ("first_file", "second_file"):
        (tmp_path / f"{name}.py").write_text("def build(config, context): ...\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    first, second = (importlib.import_module(name) for name in ("first_file", "second_file"))
    fxport.register_model("Twice", first.build)
    fxport.register_model("Twice", first.build)
    with pytest.raises(fxport.FxportError, match=r"as build in .*first_file\.py"):
        fxport.register_model("Twice", second.build)


def test_registration_by_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fxport.nn.registry import find_builder

    information = tmp_path / "package_of_mine-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Name: package-of-mine\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(
        "[fxport.models]\nInstalled = module_of_mine:make\n"
    )
    (tmp_path / "module_of_mine.py").write_text("def make(config, context): ...\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert find_builder("Installed").__name__ == "make"


class SecondAttention(GenericTransformerForCausalLM):
    """Mixes tokens where vLLM cannot see it."""

    def hidden_states(self, *arguments: Any) -> Tensor:
        hidden = super().hidden_states(*arguments)
        return hidden + 0.1 * hidden.cumsum(-2)


class CountsByIndex(GenericTransformerForCausalLM):
    """Takes no notice of `positions`."""

    def hidden_states(self, input_ids: Tensor, *_: Any) -> Tensor:
        hidden = super().hidden_states(input_ids)
        index = torch.arange(hidden.shape[-2], device=hidden.device, dtype=hidden.dtype)
        return hidden + index[:, None] * 0.1


@pytest.mark.parametrize("model_class", [SecondAttention, CountsByIndex])
def test_models_that_mix_tokens_are_refused(model_class: type[nn.Module]) -> None:
    pytest.importorskip("vllm")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from fxport.backends.vllm.builder import _values_only, check_tokens_stay_apart

    good, bad = GenericTransformerForCausalLM(SIZES), model_class(SIZES)
    with torch.no_grad(), _values_only(good), _values_only(bad):
        check_tokens_stay_apart(good, SIZES.vocab_size)
        with pytest.raises(fxport.FxportError, match="mixes tokens"):
            check_tokens_stay_apart(bad, SIZES.vocab_size)
    with torch.no_grad(), pytest.raises(fxport.FxportError, match="mixes tokens"):
        check_tokens_stay_apart(good, SIZES.vocab_size)  # its attention in place
