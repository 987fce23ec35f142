"""Collectives that start at once and are waited for by item.

Sums are taken in rank order, whatever the bucket and the transport: the same gradients give the same bits in every
ZeRO stage.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

from graphopt.runtime.alarm import Alarm
from graphopt.runtime.packing import concatenated, split_into
from graphopt.runtime.pending import Finish, Pending
from graphopt.runtime.routes import Routes
from graphopt.runtime.shared_memory import SharedMemoryTransport, connect
from graphopt.runtime.transport import GroupTransport, Transport

_SMALL_BYTES = 32 << 10  # read from the cache in less time than it takes to wait for the other ranks


class Collectives:
    """The collectives of a program, by mesh axis. Tensors of one call share dtype and device."""

    def __init__(
        self, groups: Mapping[str, dist.ProcessGroup], device: torch.device, *, share_memory: bool = True
    ) -> None:
        """All ranks of each group call this together.

        device: where the tensors are. share_memory: whether ranks on one machine may exchange through its memory.
        """
        self.device = device
        self._groups = dict(groups)
        self.alarm = Alarm.of_world() if groups else Alarm(None, 0, 1)
        look = self.alarm.look
        may_share = share_memory and device.type == "cpu"
        self._transports: dict[str, Transport] = {
            axis: (connect(group, look) if may_share else None) or GroupTransport(group, device, look)
            for axis, group in groups.items()
        }

    @property
    def shared_axes(self) -> frozenset[str]:
        """The axes whose ranks exchange through shared memory."""
        return frozenset(axis for axis, each in self._transports.items() if isinstance(each, SharedMemoryTransport))

    def rank(self, axis: str) -> int:
        """This rank's place on `axis`."""
        return dist.get_rank(self._groups[axis])

    def group_name(self, axis: str) -> str:
        """The name by which functional collectives know the group of `axis`."""
        return self._groups[axis].group_name

    def all_gather(
        self, shards: Sequence[torch.Tensor], axis: str, into: Sequence[torch.Tensor | None] | None = None
    ) -> Pending:
        """Start gathering `shards`, each [rows, ...] and alike on all ranks; results are [ranks * rows, ...].

        into: where each result goes; None for a new tensor.
        """
        return Pending(self._transports[axis].all_gather(shards, into or [None] * len(shards)))

    def reduce_scatter(self, tensors: Sequence[torch.Tensor], axis: str) -> Pending:
        """Start summing `tensors`, each [ranks * rows, ...], over the ranks; results are this rank's [rows, ...]."""
        return Pending(self._transports[axis].reduce_scatter(tensors))

    def all_reduce(self, tensors: Sequence[torch.Tensor], axis: str, reduction: str = "sum") -> Pending:
        """Start summing `tensors` over the ranks, or taking the maxima (``max``); results are whole."""
        return Pending(_start_all_reduce(tensors, self._transports[axis], reduction))

    def all_to_all(self, tensor: torch.Tensor, axis: str) -> Pending:
        """Start exchanging rows of `tensor`, [ranks * rows, ...]; result 0: those that each rank has for this one."""
        return Pending(self._transports[axis].all_to_all(tensor))

    def dispatch(self, tensor: torch.Tensor, ends: torch.Tensor, rows: int, axis: str) -> Pending:
        """Start sending rows of `tensor`, [own rows, ...], which are by group, to the ranks that have the groups.

        ends: int [ranks * groups], where each rank's groups end. Result 0: [rows, ...], those of this rank's groups, by
        group, then zeros. Raises GraphoptError, on all ranks alike, if one is sent more than `rows`.
        """
        transport = self._transports[axis]
        routes = Routes.of(ends, transport.ranks, self.rank(axis))
        routes.require_room(rows, axis)
        return Pending(transport.exchange_rows(tensor, routes.out, routes.kept, rows))

    def combine(self, tensor: torch.Tensor, ends: torch.Tensor, rows: int, axis: str) -> Pending:
        """Start sending rows back that `dispatch` has sent; result 0: [rows, ...], zeros where none was."""
        transport = self._transports[axis]
        routes = Routes.of(ends, transport.ranks, self.rank(axis))
        return Pending(transport.exchange_rows(tensor, routes.kept, routes.out, rows))


def _start_all_reduce(tensors: Sequence[torch.Tensor], transport: Transport, reduction: str) -> Finish:
    """A reduce-scatter and an all-gather: as few bytes as any all-reduce; where bytes are few, as few waits."""
    shapes = [t.shape for t in tensors]
    size = sum(t.numel() for t in tensors)
    if isinstance(transport, SharedMemoryTransport) and size * tensors[0].itemsize <= _SMALL_BYTES:
        return transport.all_reduce(tensors, reduction)
    padding = [tensors[0].new_zeros(-size % transport.ranks)] if size % transport.ranks else []
    finish_sum = transport.reduce_scatter([concatenated([*tensors, *padding])], reduction)

    def finish() -> list[torch.Tensor]:
        (whole,) = transport.all_gather(finish_sum(), [None])()
        return split_into(whole[:size], shapes)

    return finish
