"""How a parameter lies over the ranks of a mesh.

The axes that split layers cut it first, into equal parts; a rank's program sees one of them. The data-parallel axis
shards that part. A shard is cut along the first dimension of more than one row, so that every shard, and every gathered
part, is contiguous: gathering shards end to end gives the part with no copy. Ranks hold ceil(rows / ranks) rows each,
the last ones fewer or none (the rule of `torch.chunk` and of DTensor's ``Shard``); what moves between ranks is padded
to the same size everywhere.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from graphopt.errors import GraphoptError


@dataclass(frozen=True)
class Split:
    """Dimension `dim` of a parameter is cut into equal parts, one for each of the `ranks` of `axis`."""

    axis: str
    ranks: int
    dim: int


def whole_shape(shape: Sequence[int], splits: Sequence[Split]) -> tuple[int, ...]:
    """The shape of what is cut by `splits`, from that of a part."""
    whole = list(shape)
    for split in splits:
        whole[split.dim] *= split.ranks
    return tuple(whole)


@dataclass(frozen=True)
class ParameterLayout:
    """One parameter over `ranks` ranks of the data-parallel `axis`; `dim` is None for one that is not sharded there.

    shape: after `splits`, in the order of which the axes cut it: what a rank's program sees.
    dtype: of the stored shard, the master copy.
    stages: of a pipeline, those whose ranks have it; none where there is no pipeline.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    axis: str
    ranks: int
    dim: int | None
    splits: tuple[Split, ...] = ()
    stages: tuple[int, ...] = ()

    @classmethod
    def choose(
        cls,
        name: str,
        whole_shape: tuple[int, ...],
        dtype: torch.dtype,
        axis: str,
        ranks: int,
        whole: bool,
        splits: Sequence[Split] = (),
    ) -> "ParameterLayout":
        """Shard along the first dimension with more than one row, unless `whole` or there is none.

        Raises GraphoptError for a split that does not leave equal parts.
        """
        shape = list(whole_shape)
        for split in splits:
            if not 0 <= split.dim < len(shape) or shape[split.dim] % split.ranks:
                raise GraphoptError(
                    f"{name} {list(whole_shape)} cannot be split along dimension {split.dim} over the {split.ranks} "
                    f"ranks of {split.axis}: {_fitting(shape, split.ranks)}"
                )
            shape[split.dim] //= split.ranks
        rows = [d for d, size in enumerate(shape) if size != 1]
        splittable = ranks > 1 and not whole and bool(rows) and math.prod(shape) > 0
        return cls(name, tuple(shape), dtype, axis, ranks, rows[0] if splittable else None, tuple(splits))

    def split_over(self, *splits: Split) -> "ParameterLayout":
        """The same parameter with these splits in place of those it has; it stays unsharded if it is.

        Raises GraphoptError for a split that does not leave equal parts.
        """
        return self.choose(self.name, self.whole_shape, self.dtype, self.axis, self.ranks, self.is_whole, splits)

    def on_stages(self, stages: Iterable[int]) -> "ParameterLayout":
        """The same parameter on the ranks of these stages."""
        return dataclasses.replace(self, stages=tuple(sorted(stages)))

    @property
    def whole_shape(self) -> tuple[int, ...]:
        """Shape of the whole parameter."""
        return whole_shape(self.shape, self.splits)

    def part(self, whole: torch.Tensor, place: Mapping[str, int]) -> torch.Tensor:
        """What of the whole parameter one rank's program sees; a view. place: axis -> the rank's place along it."""
        for split in self.splits:
            rows = whole.shape[split.dim] // split.ranks
            whole = whole.narrow(split.dim, place[split.axis] * rows, rows)
        return whole

    def slices(self, place: Mapping[str, int]) -> tuple[slice, ...]:
        """Where in the whole parameter that lies which one rank holds. place: axis -> the rank's place along it."""
        starts, sizes = [0] * len(self.shape), list(self.whole_shape)
        for split in self.splits:
            sizes[split.dim] //= split.ranks
            starts[split.dim] += place[split.axis] * sizes[split.dim]
        if self.dim is not None:
            start, sizes[self.dim] = self.local_rows(place[self.axis])
            starts[self.dim] += start
        return tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))

    @property
    def is_whole(self) -> bool:
        """Whether each data-parallel rank holds all that its program sees."""
        return self.dim is None

    @property
    def rows(self) -> int:
        """Length of the dimension that is sharded."""
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
        """First row and number of rows that data-parallel `rank` holds, padding left out."""
        start = min(rank * self.shard_rows, self.rows)
        return start, min(start + self.shard_rows, self.rows) - start


def _fitting(shape: Sequence[int], ranks: int) -> str:
    dims = [str(dim) for dim, size in enumerate(shape) if size % ranks == 0]
    return f"they divide dimension {', '.join(dims)}" if dims else "they divide none of its dimensions"
