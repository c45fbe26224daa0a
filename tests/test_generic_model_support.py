"""The building blocks: flash forward and backward, a whole model, its training, vLLM."""

from __future__ import annotations

import math
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
    load_model,
    save_model,
)
from fxport.nn.checkpoint import fill_model

from .backends.engine import assert_same, engine, generate, recompute, sharpened

WINDOW = 5
SIZES = TransformerConfig(
    vocab_size=97,  # divides by no number of ranks
    hidden_size=48,
    intermediate_size=72,
    num_hidden_layers=4,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=64,
    sliding_window_size=WINDOW,
)


# -- the reference: plain torch, written here --------------------------------------------------


def rotated(x: Tensor, positions: Tensor, base: float = 10000.0) -> Tensor:
    """Pairs (i, i + D/2) as complex numbers, turned by position * base^(-2i/D)."""
    size = x.shape[-1]
    pairs = torch.complex(*(part.double() for part in x.chunk(2, -1)))
    rate = torch.tensor([base ** (-2 * i / size) for i in range(size // 2)]).double()
    turned = pairs * torch.exp(1j * positions.double()[:, None] * rate)[:, None]
    return torch.cat((turned.real, turned.imag), -1).to(x.dtype)


def plain_attention(
    state: dict[str, Tensor], x: Tensor, heads: int, kv_heads: int, window: int | None
) -> Tensor:
    """One sequence ``[T, C]``, head by head, row by row."""
    length = x.shape[0]
    size = state["q_proj.weight"].shape[0] // heads
    positions = torch.arange(length)
    q = rotated((x @ state["q_proj.weight"].T).view(length, heads, size), positions)
    k = rotated((x @ state["k_proj.weight"].T).view(length, kv_heads, size), positions)
    v = (x @ state["v_proj.weight"].T).view(length, kv_heads, size)
    rows = []
    for t in range(length):
        first = 0 if window is None else max(0, t + 1 - window)
        parts = []
        for h in range(heads):
            g = h // (heads // kv_heads)
            weights = (k[first : t + 1, g] @ q[t, h] / math.sqrt(size)).softmax(-1)
            parts.append(weights @ v[first : t + 1, g])
        rows.append(torch.cat(parts))
    return torch.stack(rows) @ state["o_proj.weight"].T


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def plain_model(state: dict[str, Tensor], ids: Tensor, sizes: TransformerConfig) -> Tensor:
    """One sequence ``[T]`` -> logits ``[T, V]``"""
    x = state["embed_tokens.weight"][ids]
    for i in range(sizes.num_hidden_layers):
        own = {n.removeprefix(f"layers.{i}."): v for n, v in state.items()}
        attention = {n.removeprefix("self_attn."): v for n, v in own.items()}
        heads, kv_heads = sizes.num_attention_heads, sizes.num_key_value_heads
        assert kv_heads is not None
        y = norm(x, own["input_layernorm.weight"])
        x = x + plain_attention(attention, y, heads, kv_heads, sizes.sliding_window_size)
        y = norm(x, own["post_attention_layernorm.weight"])
        gate, up = (y @ own[f"mlp.{n}_proj.weight"].T for n in ("gate", "up"))
        x = x + (gate * torch.sigmoid(gate) * up) @ own["mlp.down_proj.weight"].T
    return norm(x, state["norm.weight"]) @ state["lm_head.weight"].T


class Plain(nn.Module):
    """The reference as a module with the same parameter names, for the engine's comparison."""

    def __init__(self, state: dict[str, Tensor], sizes: TransformerConfig) -> None:
        super().__init__()
        self.state, self.sizes = state, sizes

    def forward(self, ids: Tensor) -> Tensor:
        return torch.stack([plain_model(self.state, row, self.sizes) for row in ids])


def leaves(module: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters that collect gradients of their own."""
    return {n: p.detach().clone().requires_grad_() for n, p in module.named_parameters()}


def assert_gradients(module: nn.Module, state: dict[str, Tensor]) -> None:
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(
            parameter.grad, state[name].grad, msg=lambda m, n=name: f"{n}: {m}"
        )


def double_attention(window: int | None = WINDOW) -> VLLMFlashAttention:
    torch.manual_seed(0)
    return VLLMFlashAttention(48, 6, 2, rope_base=10000.0, sliding_window=window).double()


# -- the five tests ----------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, WINDOW])
def test_flash_forward(window: int | None) -> None:
    block = double_attention(window)
    x = torch.randn(3, 11, 48, dtype=torch.float64)
    state = leaves(block)
    expected = torch.stack([plain_attention(state, row, 6, 2, window) for row in x])
    torch.testing.assert_close(block(x), expected)
    torch.testing.assert_close(block.eval()(x), expected)
    # Packed: sequences of 4, 1 and 6 tokens see nothing of each other.
    packed, bounds = x[0], torch.tensor([0, 4, 5, 11], dtype=torch.int32)
    alone = [plain_attention(state, part, 6, 2, window) for part in packed.split([4, 1, 6])]
    torch.testing.assert_close(block(packed, cu_seqlens=bounds), torch.cat(alone))
    assert not torch.allclose(block(packed), torch.cat(alone))


def test_flash_backward() -> None:
    block = double_attention()
    state = leaves(block)
    x = torch.randn(3, 11, 48, dtype=torch.float64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    seed = torch.randn(3, 11, 48, dtype=torch.float64)
    bounds = torch.tensor([0, 4, 5, 11], dtype=torch.int32)
    (block(x) * seed).sum().backward()
    (block(x[0], cu_seqlens=bounds) * seed[1]).sum().backward()
    (torch.stack([plain_attention(state, row, 6, 2, WINDOW) for row in y]) * seed).sum().backward()
    parts = [plain_attention(state, part, 6, 2, WINDOW) for part in y[0].split([4, 1, 6])]
    (torch.cat(parts) * seed[1]).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    assert_gradients(block, state)


def test_model_forward() -> None:
    torch.manual_seed(1)
    model = GenericTransformerForCausalLM(SIZES).double()
    ids = torch.randint(97, (2, 13))
    expected = torch.stack([plain_model(leaves(model), row, SIZES) for row in ids])
    torch.testing.assert_close(model(ids), expected)
    bounds = torch.tensor([0, 13, 26], dtype=torch.int32)
    torch.testing.assert_close(model(ids.flatten(), cu_seqlens=bounds), expected.flatten(0, 1))


def test_model_training(tmp_path: Path) -> None:
    """Three steps of AdamW, two accumulated batches each, then a checkpoint on 2 ranks."""
    torch.manual_seed(2)
    model = GenericTransformerForCausalLM(SIZES).double()
    state = leaves(model)
    own = torch.optim.AdamW(model.parameters(), lr=1e-2)
    reference = torch.optim.AdamW(state.values(), lr=1e-2)
    losses = []
    for _ in range(3):
        for ids in torch.randint(97, (2, 2, 9)):
            loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
            rows = torch.cat([plain_model(state, row[:-1], SIZES) for row in ids])
            expected = F.cross_entropy(rows, ids[:, 1:].flatten())
            torch.testing.assert_close(loss, expected)
            loss.backward()
            expected.backward()
            losses.append(loss.item())
        assert_gradients(model, state)
        for optimizer in (own, reference):
            optimizer.step()
            optimizer.zero_grad()
    assert len(set(losses)) == len(losses)

    save_model(model, tmp_path / "saved", {"fxport_builder": "Tested", **SIZES.to_dict()})
    contexts = ParallelContext.simulated(2)

    def reload(rank: int) -> Tensor:
        part = GenericTransformerForCausalLM(SIZES, contexts[rank]).double()
        load_model(part, tmp_path / "saved")
        part_state = full_state_dict(part)
        assert all(torch.equal(part_state[n], p) for n, p in model.state_dict().items())
        return part(ids)

    for logits in contexts[0].group.run(reload):
        torch.testing.assert_close(logits, model(ids))


@pytest.mark.engine
@pytest.mark.parametrize("tied", [False, True])
def test_vllm_wrapper(tmp_path: Path, tied: bool) -> None:
    """``LLM(directory)`` gives the reference's greedy tokens, several requests at once."""
    fxport.register_model("Tested", build)
    sizes = TransformerConfig(**{**SIZES.to_dict(), "tie_word_embeddings": tied})
    model = sharpened(lambda: GenericTransformerForCausalLM(sizes), seed=3)
    save_model(model, tmp_path / "saved", {"fxport_builder": "Tested", **sizes.to_dict()})
    prompts = [[5, 17, 3], [88], [2, 4, 8, 16, 32, 64, 31, 62]]
    reference = Plain({n: p.detach() for n, p in model.state_dict().items()}, sizes)
    expected = [recompute(reference, prompt, 12) for prompt in prompts]
    with engine(tmp_path / "saved") as llm:
        assert_same(generate(llm, prompts, 12), expected)


# -- ranks -------------------------------------------------------------------------------------


def build(config: Any, parallel_context: ParallelContext) -> nn.Module:
    return GenericTransformerForCausalLM(config, parallel_context)


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
