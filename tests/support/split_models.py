"""Small modules, each with one thing that is hard to split."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

WIDTH = 24
TOKENS = 16
Batch = dict[str, Any]


class Attention(nn.Module):
    """Causal, of heads of 4. grouped: by the operator itself, not by keys and values that are repeated. fused: one
    projection gives queries, keys and values.
    """

    def __init__(self, heads: int, kv: int, *, grouped: bool = False, fused: str = "", dropout: float = 0.0) -> None:
        super().__init__()
        self.sizes = (4 * heads, 4 * kv, 4 * kv)
        self.grouped, self.fused, self.dropout = grouped, fused, dropout
        if fused:
            self.qkv = Conv1D(sum(self.sizes), WIDTH) if fused == "conv" else nn.Linear(WIDTH, sum(self.sizes))
        else:
            self.q, self.k, self.v = (nn.Linear(WIDTH, size) for size in self.sizes)
        self.o = nn.Linear(4 * heads, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = self.qkv(x).split(self.sizes, -1) if self.fused else (self.q(x), self.k(x), self.v(x))
        q, k, v = (part.view(*x.shape[:2], -1, 4).transpose(1, 2) for part in parts)
        if not self.grouped:
            k, v = (_repeated(each, q.shape[1] // each.shape[1]) for each in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, None, self.dropout, True, enable_gqa=self.grouped)
        return self.o(y.transpose(1, 2).flatten(2))


def _repeated(x: torch.Tensor, times: int) -> torch.Tensor:
    batch, heads, rows, size = x.shape
    return x[:, :, None].expand(batch, heads, times, rows, size).reshape(batch, heads * times, rows, size)


class Mlp(nn.Module):
    """fused: gate and up are one projection."""

    def __init__(self, inner: int, *, fused: bool = False, bias: bool = False) -> None:
        super().__init__()
        self.fused = fused
        if fused:
            self.gate_up = nn.Linear(WIDTH, 2 * inner, bias)
        else:
            self.gate, self.up = nn.Linear(WIDTH, inner, bias), nn.Linear(WIDTH, inner, bias)
        self.down = nn.Linear(inner, WIDTH, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(x).chunk(2, -1) if self.fused else (self.gate(x), self.up(x))
        return self.down(F.silu(gate) * up)


class Blocks(nn.Module):
    """Layers with norms and residuals, after an embedding and before a head over the same vocabulary.

    frequencies: gradients of the embedding are divided by how often each row is read.
    """

    def __init__(
        self, *layers: nn.Module, vocabulary: int = 40, norm: Callable[[int], nn.Module] = nn.RMSNorm,
        tied: bool = False, dropout: float = 0.0, logits: bool = True, frequencies: bool = False, **loss: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, WIDTH, padding_idx=3, scale_grad_by_freq=frequencies)
        self.layers = nn.ModuleList(layers)
        self.norms = nn.ModuleList(norm(WIDTH) for _ in layers)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(WIDTH, vocabulary, bias=not tied)
        if tied:
            self.head.weight = self.embedding.weight
        self.logits, self.loss = logits, loss

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = self.embedding(ids)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = x + self.dropout(layer(norm(x)))
        logits = self.head(x)
        dtype = self.loss.get("dtype", logits.dtype)
        options = {name: value for name, value in self.loss.items() if name != "dtype"}
        loss = F.cross_entropy(logits.to(dtype).flatten(0, 1), labels.flatten(), **options).float()
        loss = (loss * loss).mean() if loss.dim() else loss
        return (loss, logits) if self.logits else (loss,)


class Convolutions(nn.Module):
    """Between two of them a relu, and one by channel or in groups."""

    def __init__(self, channels: int, groups: int, norm: bool = False) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels) if norm else nn.Identity()
        self.middle = nn.Conv2d(channels, channels, 3, padding=1, groups=groups)
        self.last = nn.Conv2d(channels, 5, 1)

    def forward(self, pixels: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.first(pixels)))
        return F.cross_entropy(self.last(F.relu(self.middle(x))).mean((2, 3)), labels)


def tokens(vocabulary: int = 40, length: int = TOKENS) -> Batch:
    """Ids of which some fill up, labels of which some do not count."""
    ids = torch.randint(vocabulary, (2, length))
    ids[1, -2:] = 3
    labels = torch.randint(vocabulary, (2, length))
    labels[0, :3] = -100
    return {"ids": ids, "labels": labels}


def images() -> Batch:
    return {"pixels": torch.randn(4, 3, 8, 8), "labels": torch.randint(5, (4,))}


ATTENTION: Mapping[str, Callable[[], nn.Module]] = {
    "one head of keys": lambda: Attention(4, 1),
    "two heads of keys": lambda: Attention(4, 2),
    "one head of keys, grouped": lambda: Attention(4, 1, grouped=True),
    "two heads of keys, grouped": lambda: Attention(4, 2, grouped=True),
    "five heads": lambda: Attention(5, 5),
    "six heads": lambda: Attention(6, 6),
    "six heads, three of keys": lambda: Attention(6, 3, grouped=True),
    "fused": lambda: Attention(4, 4, fused="linear"),
    "fused, six heads": lambda: Attention(6, 6, fused="linear"),
    "fused, grouped": lambda: Attention(4, 2, fused="linear", grouped=True),
    "fused, Conv1D": lambda: Attention(4, 4, fused="conv"),
    "dropout": lambda: Attention(4, 4, dropout=0.25),
    "dropout, six heads": lambda: Attention(6, 6, dropout=0.25),
}
MLPS: Mapping[str, Callable[[], nn.Module]] = {
    "even": lambda: Mlp(32, bias=True),
    "uneven": lambda: Mlp(30, bias=True),
    "odd": lambda: Mlp(37),
    "fused": lambda: Mlp(32, fused=True),
    "fused, uneven": lambda: Mlp(30, fused=True, bias=True),
    "fused, odd": lambda: Mlp(37, fused=True, bias=True),
}
