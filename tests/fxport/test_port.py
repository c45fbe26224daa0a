"""A port is proven or refused; a port that is broken on purpose is caught."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import fxport
from fxport.backends.torch import PackedModel
from fxport.errors import FxportError, PortError, ReasonCode, SavedPortError
from fxport.passes import serving as serving_passes
from fxport.passes.tokens.rules import has_rule
from fxport.saved import read_serving
from tests.saved_ports import edit, write_graph
from tests.zoo.gemma import Gemma
from tests.zoo.gpt import GPT
from tests.zoo.llama import Llama
from tests.zoo.mpt import MPT
from tests.zoo.off_by_one import OffByOne
from tests.zoo.oss import OSS
from tests.zoo.parallel import ParallelGPT

ZOO = {
    "gpt": GPT,
    "llama_complex": Llama,
    "llama_rotate_half": lambda: Llama(complex_rope=False),
    "gemma": Gemma,
    "mpt": MPT,
    "oss": OSS,
    "parallel": ParallelGPT,
}


def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    output = model(ids[None])
    output = output["logits"] if isinstance(output, dict) else output
    output = output[0] if isinstance(output, tuple) else output
    return output[0, -1]


@pytest.mark.parametrize("name", sorted(ZOO))
def test_packed_sequences_equal_the_model_in_float64(name):
    """Several sequences end to end, float64: every last logit, no tolerance for luck."""
    torch.manual_seed(3)
    model = ZOO[name]().eval()
    port = fxport.port(model)
    packed = PackedModel(port.serving, port.parameters)
    sequences = [torch.randint(0, 97, (n,)) for n in (5, 1, 40, 13)]
    with torch.no_grad():
        for found, sequence in zip(packed(sequences), sequences, strict=True):
            torch.testing.assert_close(found[-1], logits(model, sequence), rtol=1e-4, atol=1e-4)
    assert len(port.serving.attention) == 4
    assert not port.report.left()


def test_windows_and_softcaps_reach_the_attention_layers():
    layers = fxport.port(Gemma()).serving.attention
    assert [layer.params.window_left for layer in layers] == [23, -1, 23, -1]
    assert {layer.params.softcap for layer in layers} == {20.0}
    assert {layer.num_kv_heads for layer in layers} == {2}


def test_sinks_and_slopes_reach_the_attention_layers():
    sinks = [layer.sinks for layer in fxport.port(OSS()).serving.attention]
    assert sinks == [f"blocks.{i}.attn.sinks" for i in range(4)]
    slopes = fxport.port(MPT()).serving.attention[0].alibi_slopes
    assert slopes == pytest.approx([2 ** (-8 / 3), 2 ** (-16 / 3), 2**-8])


def test_sinks_that_are_numbers_are_saved_with_the_layers(tmp_path):
    port = fxport.port(OffByOne())
    found = [layer.sinks for layer in port.serving.attention]
    none = (0.0,) * 3
    assert found == [*[none] * 4, "layers.4.softmax.sink", none, none]
    read = read_serving(port.save(tmp_path), has_rule, torch.float32, torch.device("cpu"))
    assert read.attention == port.serving.attention


def test_a_sink_that_the_heads_share_is_refused():
    """vLLM's layer takes one for each, and a parameter loads into one tensor."""

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.sink = nn.Parameter(torch.tensor(0.5))

        def forward(self, scores):
            sinks = self.sink.expand(*scores.shape[:3], 1)
            return torch.cat((scores, sinks), -1).softmax(-1)[..., :-1]

    model = OffByOne()
    model.layers = nn.ModuleList([*model.layers[:4]])
    model.layers[2].softmax = Shared()
    with pytest.raises(PortError, match="sinks that are computed"):
        fxport.port(model)


# --- broken on purpose ------------------------------------------------------------------------


def _mutate(monkeypatch, **changes):
    """Changes an argument of every attention call after the pass, as a bug in it would."""
    original = serving_passes.rewrite_attention

    def broken(gm, **options):
        result = original(gm, **options)
        names = [a.name for a in torch.ops.fxport.attention.default._schema.arguments]
        for node in gm.graph.nodes:
            if node.target is torch.ops.fxport.attention.default:
                for name, value in changes.items():
                    old = node.args[names.index(name)]
                    node.update_arg(names.index(name), value(old))
        return result

    monkeypatch.setattr(serving_passes, "rewrite_attention", broken)


@pytest.mark.parametrize(
    "changes",
    [
        {"scale": lambda s: 1.0},
        {"scale": lambda s: s * 1.05},
        {"window_left": lambda w: 9},
        {"softcap": lambda c: 5.0},
    ],
    ids=["dropped scale", "wrong scale", "window", "softcap"],
)
@pytest.mark.parametrize("name", ["gpt", "llama_complex"])
def test_a_wrong_attention_call_is_caught(monkeypatch, name, changes):
    _mutate(monkeypatch, **changes)
    with pytest.raises(PortError) as caught:
        fxport.port(ZOO[name]())
    assert caught.value.reasons[0].code is ReasonCode.SELF_CHECK


@pytest.mark.parametrize("changes", [{"scale": lambda s: 1.0}, {"window_left": lambda w: 9}])
def test_a_wrong_attention_call_is_caught_in_half_precision(monkeypatch, changes):
    _mutate(monkeypatch, **changes)
    with pytest.raises(PortError, match="differs from the model") as caught:
        fxport.port(GPT(block_size=40).half())
    assert caught.value.reasons[0].code is ReasonCode.SELF_CHECK


class Recurrent(nn.Module):
    """Few blocks, large weights, many rounds: what rounding does to one grows in the next."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.gpt = GPT(block_size=40)
        with torch.no_grad():
            for block in self.gpt.transformer.h:
                block.mlp.c_fc.weight.mul_(12)
                block.attn.c_attn.weight.mul_(12)

    def forward(self, ids):
        parts = self.gpt.transformer
        x = parts.wte(ids) + parts.wpe(torch.arange(ids.shape[1]))
        for _ in range(3):
            for block in parts.h:
                x = block(x)
        return self.gpt.lm_head(parts.ln_f(x))


def test_rounding_that_a_model_multiplies_is_no_difference(monkeypatch):
    """More than the usual bound, and less than a wrong call makes."""
    (check,) = [d for d in fxport.port(Recurrent()).report.decisions if d.pass_name == "self-check"]
    assert 2000 * torch.finfo(torch.float32).eps < float(check.detail.split()[-1]) < 1e-2
    _mutate(monkeypatch, scale=lambda s: s * 1.05)
    with pytest.raises(PortError, match=r"rounding would be below 1.0e-02"):
        fxport.port(Recurrent())


def test_a_window_off_by_one_is_caught(monkeypatch):
    _mutate(monkeypatch, window_left=lambda w: w + 1 if w >= 0 else w)
    with pytest.raises(PortError, match="differs from the model"):
        fxport.port(Gemma())


@pytest.mark.parametrize("name", ["gpt", "parallel"])
def test_positions_off_by_one_are_caught(monkeypatch, name):
    """Learned positions; rotary ones are relative, so shifting all of them changes nothing."""
    original = serving_passes.analyse

    def broken(*args):
        found = original(*args)
        rows = {n: dataclasses.replace(r, offset=max(r.offset - 1, 0) or 1)
                for n, r in found.rows.items()}  # fmt: skip
        return dataclasses.replace(found, rows=rows)

    monkeypatch.setattr(serving_passes, "analyse", broken)
    model = ZOO[name]()
    with pytest.raises(PortError, match="differs from the model"):
        fxport.port(model, max_seq_len=100)


def test_positions_not_gathered_are_caught(monkeypatch):
    """Slices left alone give one table row per flat token: right for one sequence only."""
    original = serving_passes.gather_by_position

    def broken(gm, locality, tokens):
        result = original(gm, locality, tokens)
        positions = result[0]
        count = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.index_select.default)
        for node in count:
            with gm.graph.inserting_before(node):
                size = gm.graph.call_function(torch.ops.aten.sym_size.int, (positions, 0))
                flat = gm.graph.call_function(torch.ops.aten.arange.default, (size,))
                flat = gm.graph.call_function(torch.ops.aten.remainder.Scalar, (flat, 50))
            node.replace_input_with(positions, flat)
        return result

    monkeypatch.setattr(serving_passes, "gather_by_position", broken)
    with pytest.raises(PortError, match="differs from the model"):
        fxport.port(Llama())


def test_a_model_with_another_path_for_one_token_is_caught():
    class Odd(Llama):
        def forward(self, tokens):
            out = super().forward(tokens)
            return out * 1.5 if tokens.shape[1] == 1 else out

    with pytest.raises(PortError, match="at length 1") as caught:
        fxport.port(Odd())
    location = caught.value.reasons[0].location
    assert location is not None and location.source.startswith("return out * 1.5 if")
    with pytest.raises(PortError, match="at length 1"):  # where rounding is as large as this
        fxport.port(Odd().bfloat16())
    unlearned = Odd()
    torch.nn.init.zeros_(unlearned.output.weight)  # and all logits are 0
    with pytest.raises(PortError, match="at length 1"):
        fxport.port(unlearned)


# --- refusals ---------------------------------------------------------------------------------


def test_logits_that_are_scaled_by_position_are_refused_at_their_line():
    class Late(Llama):
        def forward(self, tokens):
            return super().forward(tokens) * torch.arange(1, 1 + tokens.shape[1])[:, None]

    with pytest.raises(PortError, match="depend on the position") as caught:
        fxport.port(Late())
    location = caught.value.reasons[0].location
    assert location is not None and "torch.arange(1" in location.source


def test_a_bidirectional_model_is_refused_at_its_line():
    class Encoder(GPT):
        pass

    model = Encoder()
    for block in model.transformer.h:
        block.attn.mask.fill_(1.0)
    with pytest.raises(PortError) as caught:
        fxport.port(model)
    reason = caught.value.reasons[0]
    assert reason.code is ReasonCode.NOT_CAUSAL
    assert reason.location is not None and reason.location.file.endswith("gpt.py")


@pytest.mark.parametrize("hole", [(7, 3), (20, 20), (150, 2)])
def test_a_mask_that_is_causal_but_for_one_entry_is_not_called_causal(hole):
    model = GPT()
    for block in model.transformer.h:
        block.attn.mask[0, 0, hole[0], hole[1]] = 0.0
    with pytest.raises(PortError):
        fxport.port(model)


def test_max_seq_len_is_checked():
    assert fxport.port(GPT(), max_seq_len=64).serving.max_position_embeddings == 64
    with pytest.raises(FxportError, match="at most 160"):
        fxport.port(GPT(), max_seq_len=161)


# --- the trainable module ---------------------------------------------------------------------


def test_module_shares_parameters_and_matches_in_both_modes():
    torch.manual_seed(0)
    model = Llama(dim=64, n_layers=4, hidden=96).train()
    port = fxport.port(model)
    module = port.module
    assert dict(module.named_parameters()).keys() == dict(model.named_parameters()).keys()
    for name, parameter in module.named_parameters():
        assert parameter is model.get_parameter(name)
    ids = torch.randint(0, 97, (2, 19))
    expected = model(ids)
    grads = torch.autograd.grad(expected.square().sum(), list(model.parameters()))
    found = module(ids)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    again = torch.autograd.grad(found.square().sum(), list(module.parameters()))
    for one, other in zip(again, grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()))
    assert model.training and module.training


# --- the saved port ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpt_port() -> tuple[GPT, fxport.Port]:
    torch.manual_seed(1)
    model = GPT()
    return model, fxport.port(model)


@pytest.fixture(scope="module")
def saved(gpt_port, tmp_path_factory) -> tuple[GPT, Path]:
    model, port = gpt_port
    return model, port.save(tmp_path_factory.mktemp("saved") / "port")


def test_saved_files(saved):
    model, directory = saved
    config = json.loads((directory / "config.json").read_text())
    assert config["architectures"] == ["FxportForCausalLM"]
    assert config["max_position_embeddings"] == 160
    assert config["vocab_size"] == 97
    (file,) = directory.glob("*.safetensors")
    weights = load_file(file)
    assert set(weights) == {n for n, _ in model.named_parameters()}
    for name, tensor in weights.items():
        assert torch.equal(tensor, model.get_parameter(name))
    json.loads((directory / "port_report.json").read_text())
    assert not list(directory.parent.glob(".*")), "a staging directory was left behind"


def test_saved_graph_runs_without_the_source(saved, tmp_path):
    """Another process, without the model's source: the graph read back gives the same logits."""
    model, directory = saved
    ids = torch.randint(0, 97, (23,))
    with torch.no_grad():
        expected = logits(model.eval(), ids)
    torch.save({"ids": ids, "expected": expected}, tmp_path / "case.pt")
    shutil.copytree(directory, tmp_path / "port")
    code = (
        "import torch; from safetensors.torch import load_file;"
        "from fxport.saved import read_serving;"
        "from fxport.passes.tokens.rules import has_rule;"
        "from fxport.backends.torch import PackedModel;"
        "case = torch.load('case.pt');"
        "serving = read_serving('port', has_rule, torch.float32, torch.device('cpu'));"
        "weights = load_file('port/model-00001-of-00001.safetensors');"
        "found = PackedModel(serving, weights)([case['ids']])[0][-1];"
        "torch.testing.assert_close(found, case['expected'], rtol=1e-4, atol=1e-4)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True,
                          text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


def test_an_existing_directory_is_refused_and_untouched(gpt_port, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FxportError, match="exists already"):
        gpt_port[1].save(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_failed_save_leaves_nothing(gpt_port, tmp_path):
    _, port = gpt_port
    with pytest.raises(FxportError, match="tokenizer"):
        port.save(tmp_path / "port", tokenizer=tmp_path / "no such directory")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: (d / "fxport_graph.json").unlink(),
        lambda d: write_graph(d, "{"),
        lambda d: write_graph(d, "[1]"),
        lambda d: write_graph(d, '{"format_version": 99}'),
        lambda d: write_graph(d, '{"format_version": 2}'),
        lambda d: edit(d, lambda g: g["own"]["attention"][0].update(num_heads=-1)),
        lambda d: edit(d, lambda g: g["own"]["parameters"].update({"x": [2**40, 2**40]})),
        lambda d: edit(d, lambda g: g["own"].update(hidden_size=math.pi)),
        lambda d: edit(d, lambda g: g["own"]["body"]["nodes"].reverse()),
    ],
)
def test_a_damaged_port_is_refused(saved, tmp_path, damage):
    _, directory = saved
    copy = tmp_path / "port"
    shutil.copytree(directory, copy)
    damage(copy)
    with pytest.raises(SavedPortError):
        read_serving(copy, has_rule, torch.float32, torch.device("cpu"))


def test_a_model_without_attention_is_refused() -> None:
    model = nn.Sequential(nn.Embedding(17, 8), nn.GELU(), nn.Linear(8, 17))
    with pytest.raises(PortError, match="the model has no attention"):
        fxport.port(model, max_seq_len=32)


def test_every_reason_has_a_line() -> None:
    class Alone(nn.Module):
        """Without attention: nothing in particular is in the way."""

        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(17, 8), nn.Linear(8, 17)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.table(ids))

    with pytest.raises(PortError, match="no attention") as caught:
        fxport.port(Alone())
    for reason in caught.value.reasons:
        assert reason.location is not None
        assert reason.location.source == "def forward(self, ids: torch.Tensor) -> torch.Tensor:"
