"""Published models of images that are small as graphs, with random weights; each gives its loss."""

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional as F

CLASSES = 1000


class Classifier(nn.Module):
    """Logits of `body`, and their cross-entropy."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.body(images), labels)


def alexnet() -> nn.Module:
    """Krizhevsky, "One weird trick for parallelizing convolutional neural networks" (2014); 224 pixels a side."""
    body = nn.Sequential(
        nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Flatten(),
        nn.Dropout(), nn.Linear(9216, 4096), nn.ReLU(),
        nn.Dropout(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, CLASSES),
    )  # fmt: skip
    return Classifier(body)


def vgg11() -> nn.Module:
    """Simonyan and Zisserman, "Very deep convolutional networks for large-scale image recognition" (2014)."""
    head = (
        nn.Linear(25088, 4096), nn.ReLU(), nn.Dropout(),
        nn.Linear(4096, 4096), nn.ReLU(), nn.Dropout(), nn.Linear(4096, CLASSES),
    )  # fmt: skip
    return Classifier(nn.Sequential(*_convolutions(), nn.Flatten(), *head))


def _convolutions() -> Iterator[nn.Module]:
    before = 3
    for widths in ((64,), (128,), (256, 256), (512, 512), (512, 512)):
        for width in widths:
            yield nn.Conv2d(before, width, 3, padding=1)
            yield nn.ReLU()
            before = width
        yield nn.MaxPool2d(2)


class _MixerBlock(nn.Module):
    def __init__(self, patches: int, width: int) -> None:
        super().__init__()
        self.before_tokens, self.before_channels = nn.LayerNorm(width), nn.LayerNorm(width)
        self.tokens = _mlp(patches, width // 2)
        self.channels = _mlp(width, 4 * width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.tokens(self.before_tokens(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.before_channels(x))


def _mlp(width: int, hidden: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


class _Mixer(nn.Module):
    def __init__(self, side: int, patch: int, width: int, blocks: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, patch, patch)
        self.blocks = nn.ModuleList(_MixerBlock((side // patch) ** 2, width) for _ in range(blocks))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.embed(images).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        logits: torch.Tensor = self.head(self.norm(x).mean(1))
        return logits


def mixer(side: int, patch: int, width: int, blocks: int) -> nn.Module:
    """Tolstikhin et al., "MLP-Mixer: an all-MLP architecture for vision" (2021)."""
    return Classifier(_Mixer(side, patch, width, blocks))
