"""How the bytes of a collective travel: over a process group, whichever its backend."""

import contextlib
import datetime
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist

from graphopt._torch import all_gather_single, reduce_scatter_single
from graphopt.runtime.alarm import LOOK_SECONDS, Look, unwatched
from graphopt.runtime.packing import concatenated, gathered_from_ranks, packed_by_rank, reduced_over_ranks, split_into
from graphopt.runtime.pending import Finish
from graphopt.runtime.routes import Run, placed_rows, rows_by_rank

_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}


class Transport(Protocol):
    """Starts collectives over the ranks of one mesh axis; each function returned waits and gives the results.

    Tensors of one call share dtype and device. Sources may go, but not change, before the wait.
    """

    ranks: int

    def all_gather(self, shards: Sequence[torch.Tensor], into: Sequence[torch.Tensor | None]) -> Finish:
        """[rows, ...] of each rank -> [ranks * rows, ...], in `into` where given."""
        ...

    def reduce_scatter(self, tensors: Sequence[torch.Tensor], reduction: str = "sum") -> Finish:
        """[ranks * rows, ...] -> this rank's [rows, ...], of which the ranks' sum, or maximum (``max``), is taken."""
        ...

    def all_to_all(self, tensor: torch.Tensor) -> Finish:
        """[ranks * rows, ...] -> [ranks * rows, ...]: from each rank the rows that it has for this one."""
        ...

    def exchange_rows(self, tensor: torch.Tensor, sent: Sequence[Run], received: Sequence[Run], rows: int) -> Finish:
        """[own rows, ...] -> [rows, ...]: `received` of what others have `sent`, zeros between.

        Both are in order of the other ranks; what one sends another is what that receives, in one order.
        """
        ...


class GroupTransport:
    """The collectives of torch.distributed, launched asynchronously.

    On the CPU gloo has no reduce-scatter of minimal cost (its own is an all-reduce a rank), so there one is an
    all-to-all and a local sum, which also fixes the order of the sum.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device, look: Look = unwatched) -> None:
        """look: called now and then in a long wait on the CPU; what it raises ends that."""
        self.ranks = dist.get_world_size(group)
        self._group = group
        self._look = look
        self._holds_up = device.type == "cpu"
        self._has_reduce_scatter = device.type != "cpu"

    def all_gather(self, shards: Sequence[torch.Tensor], into: Sequence[torch.Tensor | None]) -> Finish:
        shapes = [shard.shape for shard in shards]
        flat = concatenated(shards)
        alone = into[0] if len(shards) == 1 else None
        gathered = flat.new_empty(self.ranks * flat.numel()) if alone is None else alone.view(-1)
        work = all_gather_single(gathered, flat, group=self._group, async_op=True)

        def finish(kept: torch.Tensor = flat) -> list[torch.Tensor]:
            self._wait(work)
            if len(shapes) == 1:
                return [gathered.view(self.ranks * shapes[0][0], *shapes[0][1:])]
            return gathered_from_ranks(gathered.view(self.ranks, -1).unbind(), shapes, into)

        return finish

    def reduce_scatter(self, tensors: Sequence[torch.Tensor], reduction: str = "sum") -> Finish:
        shapes = [torch.Size((t.shape[0] // self.ranks, *t.shape[1:])) for t in tensors]
        packed = packed_by_rank(tensors, self.ranks)
        if self._has_reduce_scatter:
            total = packed.new_empty(packed.shape[1])
            work = reduce_scatter_single(total, packed, _OPS[reduction], group=self._group, async_op=True)
        else:
            total = torch.empty_like(packed)
            work = dist.all_to_all_single(total, packed, group=self._group, async_op=True)

        def finish(kept: torch.Tensor = packed) -> list[torch.Tensor]:
            self._wait(work)
            if self._has_reduce_scatter:
                return split_into(total, shapes)
            return reduced_over_ranks(total.unbind(), shapes, reduction)

        return finish

    def all_to_all(self, tensor: torch.Tensor) -> Finish:
        received = torch.empty_like(tensor)
        work = dist.all_to_all_single(received, tensor, group=self._group, async_op=True)

        def finish(kept: torch.Tensor = tensor) -> list[torch.Tensor]:
            self._wait(work)
            return [received]

        return finish

    def exchange_rows(self, tensor: torch.Tensor, sent: Sequence[Run], received: Sequence[Run], rows: int) -> Finish:
        packed = torch.cat([tensor[:0], *(tensor.narrow(0, run.here, run.rows) for run in sent)])
        arrived = tensor.new_empty((sum(run.rows for run in received), *tensor.shape[1:]))
        here, there = rows_by_rank(received, self.ranks), rows_by_rank(sent, self.ranks)
        work = dist.all_to_all_single(arrived, packed, here, there, group=self._group, async_op=True)

        def finish(kept: torch.Tensor = packed) -> list[torch.Tensor]:
            self._wait(work)
            return [placed_rows(received, arrived.split([run.rows for run in received]), arrived, rows)]

        return finish

    def _wait(self, work: dist.Work) -> None:
        """Wait; a GPU waits by itself, and this process goes on."""
        while self._holds_up and not _is_done_soon(work):
            self._look()
        work.wait()


def _is_done_soon(work: dist.Work) -> bool:
    """Whether it ends within a while, well or not."""
    with contextlib.suppress(RuntimeError):  # it did not end; or failed, as its next wait says
        work.wait(datetime.timedelta(seconds=LOOK_SECONDS))
    return work.is_completed()
