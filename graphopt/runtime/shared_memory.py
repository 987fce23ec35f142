"""Collectives of ranks on one machine through memory that they share: one copy in, one copy or sum out.

gloo moves the same bytes through sockets, in and out of the kernel.
"""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from graphopt.runtime.alarm import Look, unwatched
from graphopt.runtime.channel import Channel
from graphopt.runtime.neighbours import linked
from graphopt.runtime.packing import concatenated, gathered_from_ranks, packed_by_rank, reduced_over_ranks
from graphopt.runtime.pending import Finish
from graphopt.runtime.routes import Run, placed_rows


class SharedMemoryTransport:
    """Collectives over a channel; tensors are on the CPU."""

    def __init__(self, channel: Channel) -> None:
        self.ranks = channel.ranks
        self.channel = channel

    def all_gather(self, shards: Sequence[torch.Tensor], into: Sequence[torch.Tensor | None]) -> Finish:
        shapes = [shard.shape for shard in shards]
        elements, dtype = sum(shape.numel() for shape in shapes), shards[0].dtype
        exchange = self._post(shards, elements)

        def finish() -> list[torch.Tensor]:
            with exchange as segments:
                return gathered_from_ranks([each.view(elements, dtype) for each in segments], shapes, into)

        return finish

    def reduce_scatter(self, tensors: Sequence[torch.Tensor], reduction: str = "sum") -> Finish:
        shapes = [torch.Size((t.shape[0] // self.ranks, *t.shape[1:])) for t in tensors]
        elements, dtype = sum(t.numel() for t in tensors), tensors[0].dtype
        segment = self.channel.segment(elements * dtype.itemsize)
        packed_by_rank(tensors, self.ranks, out=segment.view(elements, dtype).view(self.ranks, -1))
        exchange = _Exchange(self.channel, self.channel.post(segment, elements * dtype.itemsize))
        rank = self.channel.rank

        def finish() -> list[torch.Tensor]:
            with exchange as segments:
                rows = [each.view(elements, dtype).view(self.ranks, -1)[rank] for each in segments]
                return reduced_over_ranks(rows, shapes, reduction)

        return finish

    def all_reduce(self, tensors: Sequence[torch.Tensor], reduction: str = "sum") -> Finish:
        """Of what is small: all ranks read all of it, and wait once; a scatter and a gather wait twice."""
        shapes = [tensor.shape for tensor in tensors]
        elements, dtype = sum(shape.numel() for shape in shapes), tensors[0].dtype
        exchange = self._post(tensors, elements)

        def finish() -> list[torch.Tensor]:
            with exchange as segments:
                return reduced_over_ranks([each.view(elements, dtype) for each in segments], shapes, reduction)

        return finish

    def all_to_all(self, tensor: torch.Tensor) -> Finish:
        shape = torch.Size((tensor.shape[0] // self.ranks, *tensor.shape[1:]))
        elements, dtype, rank = tensor.numel(), tensor.dtype, self.channel.rank
        exchange = self._post([tensor], elements)

        def finish() -> list[torch.Tensor]:
            with exchange as segments:
                rows = [each.view(elements, dtype).view(self.ranks, -1)[rank] for each in segments]
                return gathered_from_ranks(rows, [shape], [None])

        return finish

    def exchange_rows(self, tensor: torch.Tensor, sent: Sequence[Run], received: Sequence[Run], rows: int) -> Finish:
        """Each rank reads the rows where they lie, so that none is packed."""
        width = tensor[0].numel() if tensor.shape[0] else 0
        elements, dtype, shape = tensor.numel(), tensor.dtype, tensor.shape[1:]
        segment = self.channel.segment(tensor.nbytes)
        used = max((run.here + run.rows for run in sent), default=0)
        segment.view(elements, dtype)[: used * width] = tensor[:used].reshape(-1)
        exchange = _Exchange(self.channel, self.channel.post(segment, tensor.nbytes))
        like = tensor[:0]

        def finish() -> list[torch.Tensor]:
            with exchange as segments:
                lying = [each.view(elements, dtype).view(-1, *shape) for each in segments]
                found = [lying[run.rank][run.there : run.there + run.rows] for run in received]
                return [placed_rows(received, found, like, rows)]

        return finish

    def _post(self, tensors: Sequence[torch.Tensor], elements: int) -> "_Exchange":
        """Put tensors, of so many elements together, where the other ranks read them."""
        dtype = tensors[0].dtype
        segment = self.channel.segment(elements * dtype.itemsize)
        concatenated(tensors, out=segment.view(elements, dtype))
        return _Exchange(self.channel, self.channel.post(segment, elements * dtype.itemsize))


class _Exchange:
    """What all ranks posted, inside the context; let go afterwards, and also if nobody ever waits for it."""

    def __init__(self, channel: Channel, number: int) -> None:
        self._channel = channel
        self._number = number
        self._is_open = True

    def __enter__(self) -> list[Any]:
        return self._channel.read(self._number)

    def __exit__(self, *_: object) -> None:
        self._is_open = False
        self._channel.done(self._number)

    def __del__(self) -> None:
        if self._is_open:
            with contextlib.suppress(Exception):  # the others may have ended already
                self._channel.done(self._number)


def connect(group: dist.ProcessGroup, look: Look = unwatched) -> SharedMemoryTransport | None:
    """A transport for a group whose ranks all run on this machine, or None; all ranks call this together.

    look: called now and then in a long wait; what it raises ends that.
    """
    links = linked(group, look)
    return None if links is None else SharedMemoryTransport(Channel(links))
