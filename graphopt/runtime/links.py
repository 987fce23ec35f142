"""Memory that ranks on one machine share: each writes segments of its own and reads those that others offer it.

Bytes never pass a socket; sockets carry who may read what. They also order memory: what was written before a message
was sent is seen by who received it.
"""

import mmap
import os
import select
import socket
import struct
import time
from array import array
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from enum import IntEnum
from functools import partial

import torch

from graphopt.errors import RankLostError
from graphopt.runtime.alarm import LOOK_SECONDS, Look, unwatched

_MESSAGE = struct.Struct("<BQQ")
_PATIENCE_SECONDS = 30 * 60


class _Kind(IntEnum):
    """What a message says of a segment: it exists (its file comes along), may be read, was read."""

    SEGMENT = 0
    READY = 1
    DONE = 2


_Message = tuple[_Kind, int, int, int | None]  # with a segment's number, a size and a file


def _close(message: _Message) -> None:
    if message[3] is not None:
        os.close(message[3])


class Segment:
    """Bytes that one rank writes and others read.

    audience: the ranks that it was shown to. readers: those that are not done with what it holds.
    """

    def __init__(self, number: int, file: int, size: int, audience: frozenset[int] = frozenset()) -> None:
        self.number = number
        self.size = size
        self.audience = audience
        self.readers: set[int] = set()
        self.memory = torch.frombuffer(mmap.mmap(file, size), dtype=torch.uint8)

    def view(self, elements: int, dtype: torch.dtype) -> torch.Tensor:
        """Its first `elements` of `dtype`."""
        return self.memory[: elements * dtype.itemsize].view(dtype)


class Links:
    """This rank's sockets to others of a group, the segments it has made, and theirs.

    Nothing waits for a neighbour but who needs something from it; what does not fit into a socket follows later.
    """

    def __init__(
        self,
        rank: int,
        neighbours: Mapping[int, socket.socket],
        names: Sequence[int] | None = None,
        look: Look = unwatched,
    ) -> None:
        """names: the ranks of the group as messages of errors call them; without it, as the group does.

        look: called now and then in a long wait; what it raises ends that.
        """
        self.rank = rank
        self.ranks = len(neighbours) + 1
        self.others = frozenset(neighbours)
        self._sockets = dict(neighbours)
        self._names = range(self.ranks) if names is None else names
        self._look = look
        self._poll = select.poll()
        self._watched = dict.fromkeys(neighbours, 0)
        self._neighbours = {each.fileno(): neighbour for neighbour, each in neighbours.items()}
        self._unsent: dict[int, deque[_Message]] = {neighbour: deque() for neighbour in neighbours}
        self._ended: set[int] = set()
        self._own: list[Segment] = []
        self._theirs: dict[tuple[int, int], Segment] = {}
        self._offered = dict.fromkeys(neighbours, 0)
        self._readable: dict[tuple[int, int], tuple[Segment, int]] = {}
        self._abandoned: set[tuple[int, int]] = set()
        for neighbour in neighbours:
            self._watch(neighbour)

    def name(self, rank: int) -> str:
        """How an error's message calls a rank of the group."""
        return f"rank {self._names[rank]}"

    def segment(self, size: int, audience: frozenset[int]) -> Segment:
        """One of at least `size` bytes, for those ranks, that nobody reads any more; a new one if there is none."""
        while self._take_messages(0):
            pass
        fitting = [s for s in self._own if not s.readers and size <= s.size <= 2 * size and s.audience == audience]
        return min(fitting, key=lambda s: s.size) if fitting else self._new_segment(max(1, size), audience)

    def offer(self, segment: Segment, size: int, to: int) -> None:
        """Let a rank of its audience read the first `size` bytes. Does not wait for it."""
        segment.readers.add(to)
        self._send(to, _Kind.READY, segment.number, size)

    def offered(self, neighbour: int, number: int) -> tuple[Segment, int]:
        """The neighbour's offer of that number, counted from 0, and its bytes; waits for it.

        Raises RankLostError if the neighbour has ended, or is silent for a long time.
        """
        self._await(neighbour, lambda: (neighbour, number) in self._readable)
        return self._readable[neighbour, number]

    def done(self, neighbour: int, number: int) -> None:
        """This rank reads nothing of an offer any more, whether or not it has been made."""
        if (neighbour, number) in self._readable:
            segment, _ = self._readable.pop((neighbour, number))
            self._send(neighbour, _Kind.DONE, segment.number, 0)
        else:
            self._abandoned.add((neighbour, number))

    def flush(self) -> None:
        """Wait until all offers are on their way, also without this process."""
        for neighbour in self.others:
            self._await(neighbour, partial(self._has_offered_all, neighbour))

    @property
    def segments(self) -> int:
        """Segments that this rank has made so far."""
        return len(self._own)

    def close(self) -> None:
        """The others learn of it when they wait for this rank."""
        for neighbour, connection in self._sockets.items():
            connection.close()
            while self._unsent[neighbour]:
                _close(self._unsent[neighbour].popleft())

    def _new_segment(self, size: int, audience: frozenset[int]) -> Segment:
        file = os.memfd_create("graphopt")
        try:
            os.ftruncate(file, size)
            segment = Segment(len(self._own), file, size, audience)
            for neighbour in audience:
                self._send(neighbour, _Kind.SEGMENT, segment.number, size, os.dup(file))
        finally:
            os.close(file)
        self._own.append(segment)
        return segment

    def _send(self, neighbour: int, kind: _Kind, segment: int, size: int, file: int | None = None) -> None:
        """Tell a neighbour, now or as soon as it has taken what it was told before; closes the file then.

        One that has ended is noticed by who needs something from it, in `_await`.
        """
        self._unsent[neighbour].append((kind, segment, size, file))
        self._push(neighbour)

    def _push(self, neighbour: int) -> None:
        """Send as much as the socket takes."""
        unsent = self._unsent[neighbour]
        try:
            while unsent:
                kind, segment, size, file = unsent[0]
                files = [] if file is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [file]))]
                self._sockets[neighbour].sendmsg([_MESSAGE.pack(kind, segment, size)], files, socket.MSG_DONTWAIT)
                _close(unsent.popleft())
        except BlockingIOError:
            pass
        except (BrokenPipeError, ConnectionResetError):
            while unsent:
                _close(unsent.popleft())
        self._watch(neighbour)

    def _watch(self, neighbour: int) -> None:
        """Wake up from a poll for what comes from a neighbour, and when there is room for what is unsent."""
        events = 0 if neighbour in self._ended else select.POLLIN | (select.POLLOUT if self._unsent[neighbour] else 0)
        if events != self._watched[neighbour]:
            self._watched[neighbour] = events
            if events:
                self._poll.register(self._sockets[neighbour], events)
            else:
                self._poll.unregister(self._sockets[neighbour])

    def _has_offered_all(self, neighbour: int) -> bool:
        return all(kind is _Kind.DONE for kind, *_ in self._unsent[neighbour])

    def _await(self, neighbour: int, has_come: Callable[[], bool]) -> None:
        """Take messages until the one that is waited for has come."""
        started = looked = time.monotonic()
        while not has_come():
            if neighbour in self._ended:
                raise RankLostError(f"{self.name(neighbour)} has ended; its own output says why")
            self._take_messages(LOOK_SECONDS)
            now = time.monotonic()
            if now - looked >= LOOK_SECONDS:
                self._look()
                looked = now
            if now - started >= _PATIENCE_SECONDS:
                raise RankLostError(f"{self.name(neighbour)} sent nothing for {_PATIENCE_SECONDS} s")

    def _take_messages(self, seconds: float) -> bool:
        """Take a message of each neighbour that has one, or has one in so many seconds, and send what was unsent.

        Returns whether there was anything to do.
        """
        ready = self._poll.poll(seconds * 1000)
        for file, events in ready:
            neighbour = self._neighbours[file]
            if events & select.POLLOUT:
                self._push(neighbour)
            if events & ~select.POLLOUT:
                self._receive(neighbour)
        return bool(ready)

    def _receive(self, neighbour: int) -> None:
        """Take one message, which is there."""
        try:
            data, files, _, _ = self._sockets[neighbour].recvmsg(_MESSAGE.size, socket.CMSG_LEN(array("i").itemsize))
        except ConnectionResetError:  # it ended with messages of ours unread; what it sent before is still to come
            return
        if data:
            kind, number, size = _MESSAGE.unpack(data)
            self._take(neighbour, kind, number, size, [array("i", raw)[0] for _, _, raw in files])
        else:
            self._ended.add(neighbour)
            self._watch(neighbour)

    def _take(self, neighbour: int, kind: int, number: int, size: int, files: list[int]) -> None:
        if kind == _Kind.SEGMENT:
            self._theirs[neighbour, number] = Segment(number, files[0], size)
            os.close(files[0])
        elif kind == _Kind.DONE:
            self._own[number].readers.discard(neighbour)
        else:
            offer = (neighbour, self._offered[neighbour])
            self._offered[neighbour] += 1
            if offer in self._abandoned:
                self._abandoned.discard(offer)
                self._send(neighbour, _Kind.DONE, number, 0)
            else:
                self._readable[offer] = (self._theirs[neighbour, number], size)
