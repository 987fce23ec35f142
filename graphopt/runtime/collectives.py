"""Collectives that start at once and are waited for by item.

Sums are taken in rank order, whatever the bucket: the same gradients give the same bits in every ZeRO stage. gloo has
no reduce-scatter of minimal cost (its own is an all-reduce a rank), so there one is an all-to-all and a local sum.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist

from graphopt._torch import all_gather_single, reduce_scatter_single

Finish = Callable[[], list[torch.Tensor]]


class Pending:
    """The results of a collective in flight; ``pending[i].wait()`` hands out each of them once."""

    def __init__(self, finish: Finish) -> None:
        self._finish: Finish | None = finish
        self._results: list[torch.Tensor | None] = []

    def __getitem__(self, index: int) -> "PendingItem":
        return PendingItem(self, index)

    def take(self, index: int) -> torch.Tensor:
        """Wait, and give result `index` away: it lives from then on as long as its taker wants."""
        if self._finish is not None:
            self._results = list(self._finish())
            self._finish = None
        result, self._results[index] = self._results[index], None
        assert result is not None, "a result is waited for once"
        return result


class PendingItem:
    """One result of a collective in flight."""

    __slots__ = ("_index", "_pending")

    def __init__(self, pending: Pending, index: int) -> None:
        self._pending = pending
        self._index = index

    def wait(self) -> torch.Tensor:
        return self._pending.take(self._index)


class Collectives:
    """The collectives of a program, by mesh axis. Tensors of one call share dtype and device."""

    def __init__(self, groups: Mapping[str, dist.ProcessGroup]) -> None:
        self._groups = dict(groups)

    def group_name(self, axis: str) -> str:
        """The name by which functional collectives know the group of `axis`."""
        return self._groups[axis].group_name

    def all_gather(
        self, shards: Sequence[torch.Tensor], axis: str, into: Sequence[torch.Tensor | None] | None = None
    ) -> Pending:
        """Start gathering `shards`, each [rows, ...] and alike on all ranks; results are [ranks * rows, ...].

        into: where each result goes; None for a new tensor.
        """
        return Pending(_start_all_gather(list(shards), self._groups[axis], into or [None] * len(shards)))

    def reduce_scatter(self, tensors: Sequence[torch.Tensor], axis: str) -> Pending:
        """Start summing `tensors`, each [ranks * rows, ...], over the ranks; results are this rank's [rows, ...]."""
        return Pending(_start_reduce_scatter(list(tensors), self._groups[axis]))

    def all_reduce(self, tensors: Sequence[torch.Tensor], axis: str) -> Pending:
        """Start summing `tensors` over the ranks; results are whole."""
        return Pending(_start_all_reduce(list(tensors), self._groups[axis]))


def _start_all_gather(
    shards: list[torch.Tensor], group: dist.ProcessGroup, into: Sequence[torch.Tensor | None]
) -> Finish:
    """Start one all-gather for all `shards`; the function returned waits and gives the gathered tensors."""
    ranks = dist.get_world_size(group)
    flat = _flat(shards)
    alone = into[0] if len(shards) == 1 else None
    gathered = flat.new_empty(ranks * flat.numel()) if alone is None else alone.view(-1)
    work = all_gather_single(gathered, flat, group=group, async_op=True)

    def finish(kept: torch.Tensor = flat) -> list[torch.Tensor]:
        work.wait()
        return _unpack_ranks(gathered, [tuple(s.shape) for s in shards], ranks, into)

    return finish


def _start_reduce_scatter(tensors: list[torch.Tensor], group: dist.ProcessGroup) -> Finish:
    ranks = dist.get_world_size(group)
    shapes = [(t.shape[0] // ranks, *t.shape[1:]) for t in tensors]
    packed = _pack_ranks(tensors, ranks)
    if dist.get_backend(group) == "nccl":
        return _native_reduce_scatter(packed, shapes, group)
    finish_sum = _start_sum(packed, ranks, group)
    return lambda: _split(finish_sum(), shapes)


def _native_reduce_scatter(packed: torch.Tensor, shapes: list[tuple[int, ...]], group: dist.ProcessGroup) -> Finish:
    total = packed.new_empty(packed.numel() // dist.get_world_size(group))
    work = reduce_scatter_single(total, packed, group=group, async_op=True)

    def finish(kept: torch.Tensor = packed) -> list[torch.Tensor]:
        work.wait()
        return _split(total, shapes)

    return finish


def _start_sum(packed: torch.Tensor, ranks: int, group: dist.ProcessGroup) -> Callable[[], torch.Tensor]:
    """Exchange slices all to all, and add those that arrive in the order of the ranks."""
    received = torch.empty_like(packed)
    work = dist.all_to_all_single(received, packed, group=group, async_op=True)

    def finish(kept: torch.Tensor = packed) -> torch.Tensor:
        work.wait()
        parts = received.view(ranks, -1)
        total = parts[0] + parts[1]
        for rank in range(2, ranks):
            total += parts[rank]
        return total

    return finish


def _start_all_reduce(tensors: list[torch.Tensor], group: dist.ProcessGroup) -> Finish:
    """A reduce-scatter and an all-gather: as few bytes as any all-reduce, in an order of its own choosing."""
    ranks = dist.get_world_size(group)
    flat = _flat(tensors)
    size = flat.numel()
    flat = torch.nn.functional.pad(flat, (0, -size % ranks))
    finish_sum = _start_sum(flat, ranks, group)

    def finish() -> list[torch.Tensor]:
        (whole,) = _start_all_gather([finish_sum()], group, [None])()
        return _split(whole[:size], [tuple(t.shape) for t in tensors])

    return finish


def _flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    """All elements in one dimension; no copy for one contiguous tensor."""
    if len(tensors) == 1:
        return tensors[0].reshape(-1)
    return torch.cat([t.reshape(-1) for t in tensors])


def _pack_ranks(tensors: list[torch.Tensor], ranks: int) -> torch.Tensor:
    """Slice r of each tensor, side by side, for r = 0, 1, …, in one dimension."""
    if len(tensors) == 1:
        return tensors[0].reshape(-1)
    return torch.cat([t.reshape(ranks, -1) for t in tensors], dim=1).view(-1)


def _unpack_ranks(
    gathered: torch.Tensor, shapes: list[tuple[int, ...]], ranks: int, into: Sequence[torch.Tensor | None]
) -> list[torch.Tensor]:
    """The inverse of packing: each tensor's slices end to end."""
    if len(shapes) == 1:
        return [gathered.view(ranks * shapes[0][0], *shapes[0][1:])]
    columns = gathered.view(ranks, -1).split([torch.Size(shape).numel() for shape in shapes], dim=1)
    results = []
    for column, shape, target in zip(columns, shapes, into, strict=True):
        if target is None:
            target = gathered.new_empty(ranks * shape[0], *shape[1:])
        target.view(ranks, -1).copy_(column)
        results.append(target)
    return results


def _split(flat: torch.Tensor, shapes: list[tuple[int, ...]]) -> list[torch.Tensor]:
    """Consecutive pieces of `flat` in the given shapes."""
    pieces = flat.split([torch.Size(shape).numel() for shape in shapes])
    return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]
