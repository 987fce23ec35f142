"""Memory that ranks on one machine share: each writes segments of its own and reads those of its neighbours.

Bytes never pass a socket; sockets carry who may read what. They also order memory: what was written before a message
was sent is seen by who received it.
"""

import contextlib
import mmap
import os
import select
import socket
import struct
from array import array
from collections.abc import Mapping
from enum import IntEnum

import torch

from graphopt.errors import RankLostError, RankMismatchError
from graphopt.runtime.alarm import LOOK_SECONDS, Look, unwatched

_MESSAGE = struct.Struct("<BQQ")
_PATIENCE_SECONDS = 30 * 60


class _Kind(IntEnum):
    """What a message says of a segment: it exists (its file comes along), may be read, was read."""

    SEGMENT = 0
    READY = 1
    DONE = 2


class Segment:
    """Bytes that one rank writes and the others read. readers: ranks that are not done with what it holds."""

    def __init__(self, number: int, file: int, size: int) -> None:
        self.number = number
        self.size = size
        self.readers: set[int] = set()
        self._memory = torch.frombuffer(mmap.mmap(file, size), dtype=torch.uint8)

    def view(self, elements: int, dtype: torch.dtype) -> torch.Tensor:
        """Its first `elements` of `dtype`."""
        return self._memory[: elements * dtype.itemsize].view(dtype)


class Channel:
    """This rank's side of a group in which every rank posts to all others, in the same order on all of them."""

    def __init__(self, rank: int, neighbours: Mapping[int, socket.socket], look: Look = unwatched) -> None:
        """look: called now and then in a long wait; what it raises ends that."""
        self.rank = rank
        self.ranks = len(neighbours) + 1
        self._sockets = dict(neighbours)
        self._look = look
        self._posted = 0
        self._own: list[Segment] = []
        self._theirs: dict[tuple[int, int], Segment] = {}
        self._received = dict.fromkeys(neighbours, 0)
        self._readable: dict[tuple[int, int], tuple[Segment, int]] = {}
        self._abandoned: set[tuple[int, int]] = set()

    def segment(self, size: int) -> Segment:
        """A segment of at least `size` bytes that nobody reads any more; a new one if there is none."""
        for neighbour in self._sockets:
            while self._has_message(neighbour, 0):
                self._receive(neighbour)
        fitting = [s for s in self._own if not s.readers and size <= s.size <= 2 * size]
        return min(fitting, key=lambda s: s.size) if fitting else self._new_segment(max(1, size))

    def post(self, segment: Segment, size: int) -> int:
        """Let the others read the first `size` bytes. Returns the number of the exchange, the same on all ranks."""
        segment.readers = {self.rank, *self._sockets}
        self._readable[self.rank, self._posted] = (segment, size)
        for neighbour in self._sockets:
            self._send(neighbour, _Kind.READY, segment.number, size)
        self._posted += 1
        return self._posted - 1

    def read(self, exchange: int) -> list[Segment]:
        """What each rank posted, in rank order; waits for those that have not.

        Raises RankMismatchError if one posted another number of bytes, RankLostError if one has ended.
        """
        for neighbour in self._sockets:
            while (neighbour, exchange) not in self._readable:
                self._await_message(neighbour)
                self._receive(neighbour)
        posted = [self._readable[rank, exchange] for rank in range(self.ranks)]
        expected = posted[self.rank][1]
        for rank, (_, size) in enumerate(posted):
            if size != expected:
                raise RankMismatchError(
                    f"rank {rank} sent {size} bytes where rank {self.rank} sent {expected}: they run different programs"
                )
        return [segment for segment, _ in posted]

    def done(self, exchange: int) -> None:
        """This rank reads nothing of the exchange any more, whether or not everything of it has arrived."""
        own, _ = self._readable.pop((self.rank, exchange))
        own.readers.discard(self.rank)
        for neighbour in self._sockets:
            if (neighbour, exchange) in self._readable:
                segment, _ = self._readable.pop((neighbour, exchange))
                self._send(neighbour, _Kind.DONE, segment.number, 0)
            else:
                self._abandoned.add((neighbour, exchange))

    @property
    def segments(self) -> int:
        """Segments that this rank has made so far."""
        return len(self._own)

    def close(self) -> None:
        """The others learn of it when they wait for this rank."""
        for neighbour in self._sockets.values():
            neighbour.close()

    def _new_segment(self, size: int) -> Segment:
        file = os.memfd_create("graphopt")
        try:
            os.ftruncate(file, size)
            segment = Segment(len(self._own), file, size)
            for neighbour in self._sockets:
                self._send(neighbour, _Kind.SEGMENT, segment.number, size, file)
        finally:
            os.close(file)
        self._own.append(segment)
        return segment

    def _send(self, neighbour: int, kind: _Kind, segment: int, size: int, file: int | None = None) -> None:
        """Tell a neighbour. One that has ended is noticed by who needs something from it, in `_receive`."""
        files = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [file]))] if file is not None else []
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._sockets[neighbour].sendmsg([_MESSAGE.pack(kind, segment, size)], files)

    def _has_message(self, neighbour: int, seconds: float) -> bool:
        poll = select.poll()
        poll.register(self._sockets[neighbour], select.POLLIN)
        return bool(poll.poll(seconds * 1000))

    def _await_message(self, neighbour: int) -> None:
        """Raises RankLostError if there is none for a long time."""
        for _ in range(int(_PATIENCE_SECONDS / LOOK_SECONDS)):
            if self._has_message(neighbour, LOOK_SECONDS):
                return
            self._look()
        raise RankLostError(f"rank {neighbour} sent nothing for {_PATIENCE_SECONDS} s")

    def _receive(self, neighbour: int) -> None:
        """Take one message, which is there."""
        try:
            data, files, _, _ = self._sockets[neighbour].recvmsg(_MESSAGE.size, socket.CMSG_LEN(array("i").itemsize))
        except ConnectionResetError:  # it ended with messages of ours unread; what it sent before is still to come
            return
        if not data:
            raise RankLostError(f"rank {neighbour} has ended; its own output says why")
        kind, number, size = _MESSAGE.unpack(data)
        self._take(neighbour, kind, number, size, [array("i", raw)[0] for _, _, raw in files])

    def _take(self, neighbour: int, kind: int, number: int, size: int, files: list[int]) -> None:
        if kind == _Kind.SEGMENT:
            self._theirs[neighbour, number] = Segment(number, files[0], size)
            os.close(files[0])
        elif kind == _Kind.DONE:
            self._own[number].readers.discard(neighbour)
        else:
            exchange = self._received[neighbour]
            self._received[neighbour] += 1
            if (neighbour, exchange) in self._abandoned:
                self._abandoned.discard((neighbour, exchange))
                self._send(neighbour, _Kind.DONE, number, 0)
            else:
                self._readable[neighbour, exchange] = (self._theirs[neighbour, number], size)
