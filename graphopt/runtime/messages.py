"""What a message from one rank to another holds: tensors whose shapes and dtypes both know."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch

from graphopt.errors import RankMismatchError

_ALIGNMENT = 64  # bytes: of a cache line, and of any dtype


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Self:
        return cls(tuple(tensor.shape), tensor.dtype)

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def empty(self, device: torch.device) -> torch.Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device=device)

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"


def message_bytes(specs: Sequence[TensorSpec]) -> int:
    """Bytes of the tensors side by side, each from a cache line on."""
    return sum(_aligned(spec.nbytes) for spec in specs)


def laid_out(memory: torch.Tensor, specs: Sequence[TensorSpec]) -> list[torch.Tensor]:
    """Views into `memory`, uint8 [at least `message_bytes`], as those tensors side by side."""
    tensors, start = [], 0
    for spec in specs:
        tensors.append(memory[start : start + spec.nbytes].view(spec.dtype).view(spec.shape))
        start += _aligned(spec.nbytes)
    return tensors


def lay_out(tensors: Sequence[torch.Tensor], memory: torch.Tensor) -> None:
    """Copy tensors to where `laid_out` finds them."""
    for tensor, place in zip(tensors, laid_out(memory, [TensorSpec.of(t) for t in tensors]), strict=True):
        place.copy_(tensor)


def require_size(found: int, expected: int, sender: str, receiver: str) -> None:
    """Raises RankMismatchError that names both, if a message has another number of bytes."""
    if found != expected:
        raise RankMismatchError(
            f"{sender} sent a message of {found} bytes where {receiver} expects {expected}: they run different programs"
        )


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
