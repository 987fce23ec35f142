"""Which rows go where when ranks exchange rows by group (`graphopt.ir.dispatch`)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from graphopt.errors import GraphoptError


class Run(NamedTuple):
    """Rows that lie together on two ranks. here, there: their first, on this rank and on the other."""

    rank: int
    here: int
    there: int
    rows: int


@dataclass(frozen=True)
class Routes:
    """Of one rank. out: its rows, by group, and where the ranks that have their groups keep them. kept: what it keeps.

    Both are in order of the other ranks, then of groups. most: how many rows the rank keeps that is sent most.
    """

    out: list[Run]
    kept: list[Run]
    most: int

    @classmethod
    def of(cls, ends: torch.Tensor, ranks: int, rank: int) -> "Routes":
        """ends: int [ranks * groups], where each group ends among each rank's rows."""
        counts = _counts(ends.view(ranks, -1).tolist())
        groups = len(counts[0])
        share = -(-groups // ranks)
        firsts = [_firsts(each) for each in counts]
        kept_at = _kept_at(counts, share)
        out = [
            Run(group // share, firsts[rank][group], kept_at[rank][group], counts[rank][group])
            for group in range(groups)
        ]
        own = range(rank * share, min((rank + 1) * share, groups))
        kept = [
            Run(other, kept_at[other][group], firsts[other][group], counts[other][group])
            for other in range(ranks)
            for group in own
        ]
        of_groups = [sum(column) for column in zip(*counts, strict=True)]
        most = max(sum(of_groups[first : first + share]) for first in range(0, groups, share))
        return cls([run for run in out if run.rows], [run for run in kept if run.rows], most)

    def require_room(self, rows: int, axis: str) -> None:
        """Raises GraphoptError, on all ranks alike, if one is sent more rows than it has room for."""
        if self.most > rows:
            raise GraphoptError(
                f"a rank of {axis} is sent {self.most} rows for its experts and has room for {rows}: routing is too "
                "uneven for dispatch.capacity; raise it, or leave it out to have room for all rows"
            )


def rows_by_rank(runs: Sequence[Run], ranks: int) -> list[int]:
    """How many rows there are from, or for, each of the ranks."""
    return [sum(run.rows for run in runs if run.rank == rank) for rank in range(ranks)]


def placed_rows(runs: Sequence[Run], found: Sequence[torch.Tensor], like: torch.Tensor, rows: int) -> torch.Tensor:
    """[rows, ...]: what was found for each run where it belongs, zeros elsewhere. like: [any, ...], for the rest."""
    placed = like.new_zeros((rows, *like.shape[1:]))
    for run, part in zip(runs, found, strict=True):
        placed[run.here : run.here + run.rows] = part
    return placed


def _counts(ends: Sequence[Sequence[int]]) -> list[list[int]]:
    return [[end - start for start, end in zip([0, *row], row, strict=False)] for row in ends]


def _firsts(counts: Sequence[int]) -> list[int]:
    firsts = [0]
    for count in counts:
        firsts.append(firsts[-1] + count)
    return firsts[:-1]


def _kept_at(counts: Sequence[Sequence[int]], share: int) -> list[list[int]]:
    """The first row of each rank's rows of each group, where that group is kept."""
    found = [[0] * len(counts[0]) for _ in counts]
    position = 0
    for group in range(len(counts[0])):
        if group % share == 0:
            position = 0
        for rank, of_rank in enumerate(counts):
            found[rank][group] = position
            position += of_rank[group]
    return found
