"""What a rank does by itself with its part of a value: the operators OF_RANK of `ir.moves` and `ir.context`.

Dimension `dim` is cut into equal blocks; of each, rank r holds `chunk` rows from row r * chunk on, zeros where the
block ends sooner.
"""

from collections.abc import Callable
from typing import Any

import torch

from graphopt.runtime.folded import FoldedAttention


class Parts:
    """Of one rank. rank: gives its place on a mesh axis."""

    def __init__(self, rank: Callable[[str], int]) -> None:
        self._rank = rank

    def own_part(self, x: torch.Tensor, dim: int, blocks: int, chunk: int, ranks: int, axis: str) -> torch.Tensor:
        """[.., blocks * extent, ..] -> [.., blocks * chunk, ..], in new memory."""
        whole: torch.Tensor = x.unflatten(dim, (blocks, x.shape[dim] // blocks))
        first, size = self._rows(whole.shape[dim + 1], chunk, axis)
        own = whole.narrow(dim + 1, first, size)
        return self._among_zeros(own, dim + 1, 0, chunk - size).flatten(dim, dim + 1)

    def placed(self, x: torch.Tensor, dim: int, blocks: int, extent: int, ranks: int, axis: str) -> torch.Tensor:
        """[.., blocks * chunk, ..] -> [.., blocks * extent, ..]: where it was taken from, zeros elsewhere."""
        part: torch.Tensor = x.unflatten(dim, (blocks, x.shape[dim] // blocks))
        first, size = self._rows(extent, part.shape[dim + 1], axis)
        own = part.narrow(dim + 1, 0, size)
        return self._among_zeros(own, dim + 1, first, extent - first - size).flatten(dim, dim + 1)

    def on_first(self, x: torch.Tensor, axis: str) -> torch.Tensor:
        """On rank 0 the value, zeros on the others, in new memory."""
        return x.clone(memory_format=torch.contiguous_format) if self._rank(axis) == 0 else x.new_zeros(x.shape)

    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float | None, ranks: int, axis: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `FoldedAttention.forward`."""
        return FoldedAttention(self._rank(axis), ranks, scale).forward(query, keys, values)

    def attend_backward(self, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As `FoldedAttention.backward`, with the scale, the ranks and the axis behind its arguments."""
        *tensors, scale, ranks, axis = arguments
        return FoldedAttention(self._rank(axis), ranks, scale).backward(*tensors)

    def _rows(self, extent: int, chunk: int, axis: str) -> tuple[int, int]:
        """First row of a block that this rank holds, and how many it holds."""
        first = min(self._rank(axis) * chunk, extent)
        return first, min(chunk, extent - first)

    @staticmethod
    def _among_zeros(x: torch.Tensor, dim: int, before: int, after: int) -> torch.Tensor:
        """A contiguous copy with so many rows of zeros before and after."""
        padding = [0, 0] * (x.dim() - 1 - dim) + [before, after]
        return torch.nn.functional.pad(x, padding).contiguous()
