"""How a parameter lies over the ranks of a mesh axis.

A sharded parameter is cut along its first dimension of more than one row, so that every shard, and every gathered
parameter, is contiguous: gathering shards end to end gives the parameter with no copy. Ranks hold ceil(rows / ranks)
rows each, the last ones fewer or none (the rule of `torch.chunk` and of DTensor's ``Shard``); what moves between
ranks is padded to the same size everywhere.
"""

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ParameterLayout:
    """One parameter over `ranks` ranks of `axis`; `dim` is None for a parameter that stays whole.

    shape, dtype: of the whole parameter (dtype is that of the stored shard, the master copy).
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    axis: str
    ranks: int
    dim: int | None

    @classmethod
    def choose(
        cls, name: str, shape: tuple[int, ...], dtype: torch.dtype, axis: str, ranks: int, whole: bool
    ) -> "ParameterLayout":
        """Cut along the first dimension with more than one row, unless `whole` or there is none."""
        rows = [d for d, size in enumerate(shape) if size != 1]
        splittable = ranks > 1 and not whole and bool(rows) and math.prod(shape) > 0
        return cls(name, tuple(shape), dtype, axis, ranks, rows[0] if splittable else None)

    @property
    def is_whole(self) -> bool:
        return self.dim is None

    @property
    def rows(self) -> int:
        """Length of the dimension that is cut."""
        assert self.dim is not None
        return self.shape[self.dim]

    @property
    def shard_rows(self) -> int:
        """Rows of a padded shard, the same on every rank."""
        return -(-self.rows // self.ranks)

    @property
    def row_shape(self) -> tuple[int, ...]:
        assert self.dim is not None
        return self.shape[self.dim + 1 :]

    @property
    def shard_shape(self) -> tuple[int, ...]:
        """Shape of a padded shard; the leading dimensions of size one are dropped."""
        return (self.shard_rows, *self.row_shape)

    @property
    def gathered_shape(self) -> tuple[int, ...]:
        """Shape of all padded shards end to end."""
        return (self.shard_rows * self.ranks, *self.row_shape)

    @property
    def is_padded(self) -> bool:
        return self.shard_rows * self.ranks != self.rows

    def local_rows(self, rank: int) -> tuple[int, int]:
        """First row and number of rows that `rank` holds, padding left out."""
        start = min(rank * self.shard_rows, self.rows)
        return start, min(start + self.shard_rows, self.rows) - start
