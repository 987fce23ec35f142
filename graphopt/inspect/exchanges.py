"""What collectives and moves give on each rank of a mesh, from the values on all ranks, said as plainly as can be."""

import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from graphopt.ir import dispatch, moves
from graphopt.ir.collectives import Collective
from graphopt.ir.context import CONTEXT_ATTENTION, FOLD, UNFOLD
from graphopt.runtime.parts import Parts

Values = list[Any]  # one for each rank
attend = torch.nn.functional.scaled_dot_product_attention

_COMBINE: dict[str, Callable[..., torch.Tensor]] = {"sum": torch.add, "max": torch.maximum}


class Exchanges:
    """Of a mesh: axis name -> ranks, laid out with the first axis varying slowest."""

    def __init__(self, mesh: Mapping[str, int]) -> None:
        self._axes = list(mesh)
        self._places = list(itertools.product(*(range(size) for size in mesh.values())))
        self.parts = [Parts(functools.partial(self.index, rank)) for rank in range(len(self._places))]

    @property
    def ranks(self) -> int:
        return len(self._places)

    def collective(self, collective: Collective, value: Values, *arguments: Any) -> Values:
        """What a collective gives for one of the tensors that it was launched for; arguments: its others."""
        axis = collective.axis
        if collective.kind in ("dispatch", "combine"):
            return (self.dispatched if collective.kind == "dispatch" else self.combined)(value, *arguments)
        if collective.kind == "all-gather":
            return self.gathered(value, 0, axis)
        if collective.kind == "all-to-all":
            return self.exchanged(value, 0, 0, axis)
        total = self.reduced(value, axis, collective.reduction or "sum")
        if collective.kind == "all-reduce":
            return total
        return [total[rank].chunk(len(self._group(rank, axis)))[self.index(rank, axis)].clone() for rank in self._all]

    def gathered(self, value: Values, dim: int, axis: str) -> Values:
        """The values of an axis's ranks end to end."""
        return [torch.cat([value[other] for other in self._group(rank, axis)], dim) for rank in self._all]

    def reduced(self, value: Values, axis: str, reduction: str = "sum") -> Values:
        """Sums, or maxima, in the order of the ranks."""
        groups = ([value[other] for other in self._group(rank, axis)] for rank in self._all)
        return [functools.reduce(_COMBINE[reduction], rest, first.clone()) for first, *rest in groups]

    def exchanged(self, value: Values, split_dim: int, gather_dim: int, axis: str) -> Values:
        """From each rank of an axis the part of `split_dim` that it has for this one, end to end in `gather_dim`."""
        found = []
        for rank in self._all:
            group = self._group(rank, axis)
            parts = [value[other].chunk(len(group), split_dim)[self.index(rank, axis)] for other in group]
            found.append(torch.cat(parts, gather_dim))
        return found

    def dispatched(self, value: Values, ends: Values, rows: int, ranks: int, axis: str) -> Values:
        """Of the rows on all ranks of an axis, those of the groups that a rank has; zeros behind them."""
        found = []
        for rank in self._all:
            by_group = [_groups(value[other], of_rank) for other, of_rank in self._ends(rank, ends, axis)]
            share = -(-len(by_group[0]) // ranks)
            own = range(self.index(rank, axis) * share, min((self.index(rank, axis) + 1) * share, len(by_group[0])))
            taken = torch.cat([value[rank][:0], *(groups[group] for group in own for groups in by_group)])
            found.append(torch.cat([taken, taken.new_zeros((rows - taken.shape[0], *taken.shape[1:]))]))
        return found

    def combined(self, value: Values, ends: Values, rows: int, ranks: int, axis: str) -> Values:
        """The rows of each rank, from where `dispatched` has put them; zeros behind them."""
        found = []
        for rank in self._all:
            all_ends = self._ends(rank, ends, axis)
            groups = all_ends[0][1].numel()
            share = -(-groups // ranks)
            counts = torch.stack([torch.diff(of_rank, prepend=of_rank.new_zeros(1)) for _, of_rank in all_ends])
            taken = [value[rank][:0]]
            for group in range(groups):
                owner = all_ends[group // share][0]
                before = int(counts[:, group // share * share : group].sum())
                before += int(counts[: self.index(rank, axis), group].sum())
                taken.append(value[owner][before : before + int(counts[self.index(rank, axis), group])])
            own = torch.cat(taken)
            found.append(torch.cat([own, own.new_zeros((rows - own.shape[0], *own.shape[1:]))]))
        return found

    def _ends(self, rank: int, ends: Values, axis: str) -> list[tuple[int, torch.Tensor]]:
        """The ranks of an axis that `rank` is on, each with where its groups end."""
        group = self._group(rank, axis)
        return list(zip(group, ends[rank].view(len(group), -1).unbind(), strict=True))

    def whole(self, value: Values, dim: int, blocks: int, extent: int, axis: str) -> Values:
        """The blocks of which the ranks hold parts, end to end and without padding."""
        parts = [each.unflatten(dim, (blocks, each.shape[dim] // blocks)) for each in value]
        gathered = self.gathered(parts, dim + 1, axis)
        return [each.narrow(dim + 1, 0, extent).flatten(dim, dim + 1).contiguous() for each in gathered]

    def own(self, name: str, value: Values, *arguments: Any) -> Values:
        """What each rank does by itself."""
        return [getattr(parts, name)(each, *arguments) for parts, each in zip(self.parts, value, strict=True)]

    @property
    def _all(self) -> range:
        return range(self.ranks)

    def index(self, rank: int, axis: str) -> int:
        """The place of a rank on an axis; 0 on one that the mesh has not."""
        return self._places[rank][self._axes.index(axis)] if axis in self._axes else 0

    def _group(self, rank: int, axis: str) -> list[int]:
        """The ranks that differ from `rank` on `axis` alone, in order."""
        position = self._axes.index(axis)
        place = self._places[rank]
        return [
            other
            for other, theirs in enumerate(self._places)
            if theirs[:position] + theirs[position + 1 :] == place[:position] + place[position + 1 :]
        ]


def _groups(rows: torch.Tensor, ends: torch.Tensor) -> list[torch.Tensor]:
    starts = [0, *ends.tolist()]
    return [rows[start:end] for start, end in itertools.pairwise(starts)]


def _part(exchanges: Exchanges, value: Values, *arguments: Any) -> Values:
    *where, _ = arguments
    return exchanges.own("own_part", value, *where)


def _gather(exchanges: Exchanges, value: Values, *arguments: Any) -> Values:
    dim, blocks, extent, _, axis, _ = arguments
    return exchanges.whole(value, dim, blocks, extent, axis)


def _scatter_sum(exchanges: Exchanges, value: Values, *arguments: Any) -> Values:
    return exchanges.own("own_part", exchanges.reduced(value, arguments[-1]), *arguments)


def _all_to_all(exchanges: Exchanges, value: Values, *arguments: Any) -> Values:
    split_dim, gather_dim, _, axis = arguments
    return exchanges.exchanged(value, split_dim, gather_dim, axis)


def _context_attention(
    exchanges: Exchanges, query: Values, key: Values, value: Values, scale: float | None, ranks: int, axis: str
) -> Values:
    """The attention of the whole, of which each rank keeps its rows."""
    wholes = ([UNFOLD(each, 2, 1, ranks) for each in exchanges.gathered(x, 2, axis)] for x in (query, key, value))
    attended = [attend(q, k, v, is_causal=True, scale=scale, enable_gqa=True) for q, k, v in zip(*wholes, strict=True)]
    folded = [FOLD(each, 2, 1, ranks) for each in attended]
    return exchanges.own("own_part", folded, 2, 1, query[0].shape[2], ranks, axis)


MOVES: dict[object, Callable[..., Values]] = {
    moves.ENTER: lambda exchanges, value, axis: value,
    moves.LEAVE: Exchanges.reduced,
    moves.PART: _part,
    moves.GATHER: _gather,
    moves.SCATTER_SUM: _scatter_sum,
    moves.ALL_TO_ALL: _all_to_all,
    dispatch.DISPATCH: Exchanges.dispatched,
    dispatch.COMBINE: Exchanges.combined,
    moves.FIRST: lambda exchanges, value, axis: exchanges.own("on_first", value, axis),
    CONTEXT_ATTENTION: _context_attention,
    moves.MAXIMUM: functools.partial(Exchanges.reduced, reduction="max"),
}
"""Operators of `ir.moves` and `ir.context`: called with exchanges, the value on all ranks, and the other arguments."""
