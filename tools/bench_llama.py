"""A Llama as people write it by hand, in the sizes that the GPU benchmarks use.

One of them is a mixture of experts whose weights are looked up for each token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["SIZES", "Llama", "Size"]


@dataclass(frozen=True)
class Size:
    """Shape of a Llama; `tied`: the head's weight is the embedding's.

    With `experts`, each token goes through `chosen` of them, `hidden` wide each.
    """

    width: int
    layers: int
    heads: int
    kv_heads: int
    hidden: int
    vocabulary: int
    tied: bool
    length: int
    experts: int = 0
    chosen: int = 0

    @property
    def head_size(self) -> int:
        """Of q, k and v."""
        return self.width // self.heads

    def hugging_face(self) -> dict[str, Any]:
        """The `config.json` of a model of this shape in Transformers and in vLLM."""
        kind, experts = ("llama", "Llama"), {}
        if self.experts:
            kind = ("mixtral", "Mixtral")
            experts = {"num_local_experts": self.experts, "num_experts_per_tok": self.chosen}
        return {
            **experts,
            "architectures": [f"{kind[1]}ForCausalLM"],
            "model_type": kind[0],
            "hidden_size": self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_size,
            "intermediate_size": self.hidden,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": self.tied,
            "max_position_embeddings": self.length,
            "rope_theta": 500000.0,
            "rms_norm_eps": 1e-5,
            "dtype": "bfloat16",
        }


SIZES = {
    "tiny": Size(256, 4, 4, 2, 704, 997, True, 2048),
    "350m": Size(1024, 24, 16, 8, 2816, 32000, True, 2048),
    "1b": Size(2048, 16, 32, 8, 8192, 128256, True, 4096),  # Llama-3.2-1B
    # a layer's experts as in Qwen3-30B-A3B
    "mixture": Size(2048, 8, 32, 8, 768, 32000, False, 4096, experts=128, chosen=8),
    "mixture-tiny": Size(128, 2, 4, 2, 32, 997, False, 1024, experts=6, chosen=2),
    "8b": Size(4096, 32, 32, 8, 14336, 128256, False, 4096),  # Llama-3.1-8B
}


class _RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-5)
        return y.type_as(x) * self.weight


def _rotate_half(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


class _Attention(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads, self.kv_heads = size.heads, size.kv_heads
        self.head_size = size.head_size
        self.q_proj = nn.Linear(size.width, size.width, bias=False)
        self.k_proj = nn.Linear(size.width, size.kv_heads * self.head_size, bias=False)
        self.v_proj = nn.Linear(size.width, size.kv_heads * self.head_size, bias=False)
        self.o_proj = nn.Linear(size.width, size.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        B, T, C = x.shape
        q = self.q_proj(x).view(B, T, self.heads, self.head_size).transpose(1, 2)
        k = self.k_proj(x).view(B, T, self.kv_heads, self.head_size).transpose(1, 2)
        v = self.v_proj(x).view(B, T, self.kv_heads, self.head_size).transpose(1, 2)
        q = (q * cos + _rotate_half(q) * sin).to(x.dtype)
        k = (k * cos + _rotate_half(k) * sin).to(x.dtype)
        k = k.repeat_interleave(self.heads // self.kv_heads, dim=1)
        v = v.repeat_interleave(self.heads // self.kv_heads, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, C))


class _MLP(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class _Experts(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.chosen = size.chosen
        self.router = nn.Linear(size.width, size.experts, bias=False)
        self.gate_up = nn.Parameter(torch.empty(size.experts, 2 * size.hidden, size.width))
        self.down = nn.Parameter(torch.empty(size.experts, size.width, size.hidden))
        nn.init.normal_(self.gate_up, std=0.02)
        nn.init.normal_(self.down, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        part, expert = torch.topk(self.router(x).float().softmax(-1), self.chosen, dim=-1)
        part = (part / part.sum(-1, keepdim=True)).type_as(x)
        gate, up = torch.einsum("btkoi,bti->btko", self.gate_up[expert], x).chunk(2, dim=-1)
        y = torch.einsum("btkoi,btki->btko", self.down[expert], F.silu(gate) * up)
        return (y * part.unsqueeze(-1)).sum(-2)


class _Block(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = _RMSNorm(size.width), _RMSNorm(size.width)
        self.attention = _Attention(size)
        self.mlp = _Experts(size) if size.experts else _MLP(size.width, size.hidden)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.norm_1(x), cos, sin)
        return x + self.mlp(self.norm_2(x))


class Llama(nn.Module):
    """``[B, T]`` token ids -> ``[B, T, V]`` logits; the rotary tables stay in float32."""

    cos: Tensor
    sin: Tensor

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.embed = nn.Embedding(size.vocabulary, size.width)
        self.blocks = nn.ModuleList(_Block(size) for _ in range(size.layers))
        self.norm = _RMSNorm(size.width)
        self.head = nn.Linear(size.width, size.vocabulary, bias=False)
        if size.tied:
            nn.init.normal_(self.embed.weight, std=0.02)
            self.head.weight = self.embed.weight
        half = size.head_size // 2
        with torch.device("cpu"):  # real numbers, also where the parameters are on meta
            frequencies = 500000.0 ** (-torch.arange(half, dtype=torch.float32) / half)
            angles = torch.outer(torch.arange(size.length, dtype=torch.float32), frequencies)
            angles = torch.cat((angles, angles), dim=-1)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        T = tokens.shape[1]
        cos, sin = self.cos[:T], self.sin[:T]
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.head(self.norm(x))

    def hugging_face(self) -> dict[str, Tensor]:
        """The weights under the names of Transformers' class."""
        names = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
        inner = {"norm_1": "input_layernorm", "norm_2": "post_attention_layernorm"}
        found: dict[str, Tensor] = {}
        for name, weight in self.named_parameters():  # a tied head is not named again
            first, *rest = name.split(".")
            if first != "blocks":
                found[".".join([names[first], *rest])] = weight
                continue
            layer, part, *rest = rest
            part = inner.get(part, "self_attn" if part == "attention" else part)
            found.update(_of_layer(f"model.layers.{layer}", part, rest, weight))
        return {name: weight.detach().contiguous() for name, weight in found.items()}


def _of_layer(prefix: str, part: str, rest: list[str], weight: Tensor) -> dict[str, Tensor]:
    experts = f"{prefix}.block_sparse_moe"
    if rest == ["router", "weight"]:
        return {f"{experts}.gate.weight": weight}
    if rest == ["gate_up"]:
        pairs = [(e, w.chunk(2)) for e, w in enumerate(weight)]
        return {
            f"{experts}.experts.{e}.{name}.weight": half
            for e, halves in pairs
            for name, half in zip(("w1", "w3"), halves, strict=True)
        }
    if rest == ["down"]:
        return {f"{experts}.experts.{e}.w2.weight": w for e, w in enumerate(weight)}
    return {".".join([prefix, part, *rest]): weight}
