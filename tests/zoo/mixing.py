"""Language models without attention: each mixes tokens in another way, so none is servable."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxport.errors import ReasonCode

VOCAB, WIDTH, LAYERS, LIMIT = 53, 24, 4, 64


class _Stack(nn.Module):
    """Embedding, `LAYERS` mixers with residuals, head."""

    def __init__(self, mixer: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB)
        self.mixers = nn.ModuleList(mixer() for _ in range(LAYERS))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for mixer in self.mixers:
            x = x + mixer(x)
        return self.head(x)


class Recurrent(nn.Module):
    """`nn.LSTM`."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(WIDTH, WIDTH, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.rnn(x)
        return y


class Scan(nn.Module):
    """As in Mamba: a short causal convolution, then a gated running sum."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 4, groups=WIDTH, padding=3)
        self.rate = nn.Parameter(torch.rand(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.conv(x.transpose(1, 2))[..., : x.shape[1]]).transpose(1, 2)
        return y * torch.cumsum(y * torch.sigmoid(self.rate), 1)


class WeightedKeyValue(nn.Module):
    """As in RWKV: the token before is mixed in, sums decay with distance."""

    def __init__(self) -> None:
        super().__init__()
        self.key, self.value = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.shift = nn.ZeroPad2d((0, 0, 1, -1))
        self.decay = nn.Parameter(torch.rand(WIDTH) / 8)

    def forward(self, x: Tensor) -> Tensor:
        before = self.shift(x)
        k, v = torch.exp(self.key(x + before)), self.value(before)
        faded = torch.exp(-self.decay * torch.arange(x.shape[1])[:, None])
        return torch.cumsum(k * v / faded, 1) / torch.cumsum(k / faded, 1)


class LongConvolution(nn.Module):
    """As in Hyena: a filter as long as the sequence, by Fourier transforms."""

    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.randn(WIDTH, LIMIT) / 8)

    def forward(self, x: Tensor) -> Tensor:
        t = x.shape[1]
        y = torch.fft.rfft(x.transpose(1, 2), n=2 * t) * torch.fft.rfft(self.filter[:, :t], n=2 * t)
        return torch.fft.irfft(y, n=2 * t)[..., :t].transpose(1, 2)


# Name -> (model, what the refusal says, the function in whose line it says so).
REFUSED: dict[str, tuple[Callable[[], nn.Module], ReasonCode, type[nn.Module]]] = {
    "LSTM": (lambda: _Stack(Recurrent), ReasonCode.MIXES_TOKENS, Recurrent),
    "Mamba": (lambda: _Stack(Scan), ReasonCode.MIXES_TOKENS, Scan),
    "RWKV": (lambda: _Stack(WeightedKeyValue), ReasonCode.MIXES_TOKENS, WeightedKeyValue),
    "Hyena": (lambda: _Stack(LongConvolution), ReasonCode.DEPENDS_ON_LENGTH, LongConvolution),
}
