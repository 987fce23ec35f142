"""Messages between ranks over a process group, whichever its backend."""

import contextlib
import datetime
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from queue import SimpleQueue
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from graphopt.errors import RankLostError, RankMismatchError
from graphopt.runtime.alarm import LOOK_SECONDS, Look, unwatched
from graphopt.runtime.messages import TensorSpec, laid_out, lay_out, message_bytes, require_size
from graphopt.runtime.pending import Finish

_SIZE, _MESSAGE, _NEVER = 1, 2, 3  # tags
_T = TypeVar("_T")


class StreamPeers:
    """Tensors on a device whose stream waits for messages, not this process.

    Both ranks of a pair launch what they exchange, in both directions, in one order.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self._group = group
        self._device = device
        self._sent: list[tuple[dist.Work, torch.Tensor]] = []

    def send(self, to: int, tensors: Sequence[torch.Tensor]) -> None:
        self._sent = [(work, tensor) for work, tensor in self._sent if not work.is_completed()]
        for tensor in filter(torch.Tensor.numel, tensors):
            tensor = tensor.contiguous()
            work = dist.isend(tensor, group=self._group, group_dst=to)
            assert work is not None, "this rank is of the group"
            self._sent.append((work, tensor))

    def receive(self, source: int, specs: Sequence[TensorSpec]) -> Finish:
        tensors = [spec.empty(self._device) for spec in specs]
        works = [dist.irecv(each, group=self._group, group_src=source) for each in filter(torch.Tensor.numel, tensors)]

        def finish() -> list[torch.Tensor]:
            for work in works:
                assert work is not None, "this rank is of the group"
                work.wait()
            return tensors

        return finish

    def flush(self) -> None:
        for work, _ in self._sent:
            work.wait()
        self._sent = []

    def close(self) -> None:
        """The others learn of it by the group's own timeout."""
        self._sent = []


class HostPeers:
    """Tensors on the CPU: a thread for what goes to a rank, and one for what comes from it, each in order.

    gloo ends a process to which it brings more bytes than that expects, and says nothing of fewer, so its size goes
    ahead of a message. A wait of gloo that ends early closes its connections, so threads wait, and looks are between.
    """

    def __init__(self, group: dist.ProcessGroup, look: Look = unwatched) -> None:
        self._group = group
        self._look = look
        self._senders: defaultdict[int, _Line] = defaultdict(_Line)
        self._receivers: defaultdict[int, _Line] = defaultdict(_Line)
        self._sent: list[tuple[int, Future[None]]] = []

    def send(self, to: int, tensors: Sequence[torch.Tensor]) -> None:
        message = torch.empty(message_bytes([TensorSpec.of(tensor) for tensor in tensors]), dtype=torch.uint8)
        lay_out(tensors, message)
        self._sent = [(rank, sent) for rank, sent in self._sent if not sent.done() or sent.exception()]
        self._sent.append((to, self._senders[to].start(lambda: _send(message, self._group, to))))

    def receive(self, source: int, specs: Sequence[TensorSpec]) -> Finish:
        size = message_bytes(specs)
        arrived = self._receivers[source].start(lambda: _receive(size, self._group, source))

        def finish() -> list[torch.Tensor]:
            return laid_out(self._result(arrived, source), specs)

        return finish

    def flush(self) -> None:
        for rank, sent in self._sent:
            self._result(sent, rank)
        self._sent = []

    def close(self) -> None:
        """A wait that ends early ends those of the threads: none is left in gloo when the process ends."""
        others = {*self._senders, *self._receivers}
        for other in others:
            with contextlib.suppress(RuntimeError):
                work = dist.irecv(torch.empty(1), group=self._group, group_src=other, tag=_NEVER)
                assert work is not None, "this rank is of the group"
                work.wait(datetime.timedelta(milliseconds=1))
        for line in (*self._senders.values(), *self._receivers.values()):
            line.end()

    def _result(self, future: Future[_T], other: int) -> _T:
        while not wait([future], LOOK_SECONDS).done:
            self._look()
        try:
            return future.result()
        except RankMismatchError:
            raise
        except RuntimeError as error:  # gloo's
            name, said = _name(self._group, other), str(error).splitlines()[0]
            raise RankLostError(f"{name} has ended, or cannot be reached: {said}") from error


def _send(message: torch.Tensor, group: dist.ProcessGroup, to: int) -> None:
    dist.send(torch.tensor([message.nbytes]), group=group, group_dst=to, tag=_SIZE)
    if message.nbytes:
        dist.send(message, group=group, group_dst=to, tag=_MESSAGE)


def _receive(size: int, group: dist.ProcessGroup, source: int) -> torch.Tensor:
    found = torch.empty(1, dtype=torch.int64)
    dist.recv(found, group=group, group_src=source, tag=_SIZE)
    require_size(int(found), size, _name(group, source), _name(group, dist.get_rank(group)))
    message = torch.empty(size, dtype=torch.uint8)
    if size:
        dist.recv(message, group=group, group_src=source, tag=_MESSAGE)
    return message


def _name(group: dist.ProcessGroup, rank: int) -> str:
    return f"rank {dist.get_global_rank(group, rank)}"


class _Line:
    """A thread that does one thing after the other; it keeps no process from ending."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._thread = threading.Thread(target=_work, args=(self._jobs,), daemon=True)
        self._thread.start()

    def start(self, job: Callable[[], _T]) -> Future[_T]:
        future: Future[_T] = Future()
        self._jobs.put((future, job))
        return future

    def end(self) -> None:
        """Wait for it a little: what it does has failed, or does so now."""
        self._jobs.put(None)
        self._thread.join(LOOK_SECONDS)

    def __del__(self) -> None:
        self._jobs.put(None)


def _work(jobs: "SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]") -> None:
    while (found := jobs.get()) is not None:
        future, job = found
        try:
            future.set_result(job())
        except Exception as error:
            future.set_exception(error)
        del found, future, job  # what it has sent is not kept while it waits for more
