"""Messages from one rank of a group to another, each of which both know by its place in their order."""

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist

from graphopt.runtime.alarm import Look, unwatched
from graphopt.runtime.group_peers import HostPeers, StreamPeers
from graphopt.runtime.links import Links
from graphopt.runtime.messages import TensorSpec, laid_out, lay_out, message_bytes, require_size
from graphopt.runtime.neighbours import linked
from graphopt.runtime.pending import Finish


class Peers(Protocol):
    """The other ranks of a group. What one sends another is received in the order in which it was sent."""

    def send(self, to: int, tensors: Sequence[torch.Tensor]) -> None:
        """Start sending. Does not wait for the receiver; the tensors may go, but not change, before they arrive."""
        ...

    def receive(self, source: int, specs: Sequence[TensorSpec]) -> Finish:
        """Start receiving the next message of `source`; the function returned waits and gives its tensors, once.

        It raises RankMismatchError if the message has other bytes than the specs, RankLostError if `source` has ended.
        """
        ...

    def flush(self) -> None:
        """Wait until what was sent arrives also if this process ends. May raise RankLostError if a receiver has."""
        ...

    def close(self) -> None:
        """After an error: exchange nothing any more. Whoever waits for this rank learns that it is lost."""
        ...


def peers_of(
    group: dist.ProcessGroup, device: torch.device, look: Look = unwatched, *, share_memory: bool = True
) -> Peers:
    """The ranks of `group` to this one; all of them call this together.

    device: where the tensors are. look: called now and then in a long wait on the CPU; what it raises ends that.
    share_memory: whether ranks on one machine may exchange through its memory.
    """
    if device.type != "cpu":
        return StreamPeers(group, device)
    links = linked(group, look) if share_memory else None
    return HostPeers(group, look) if links is None else SharedMemoryPeers(links)


class SharedMemoryPeers:
    """Ranks on one machine, tensors on the CPU: one copy in, one copy out.

    A message lies in memory of its sender until it is received: there are as many as the senders are ahead.
    """

    def __init__(self, links: Links) -> None:
        self.links = links
        self._received = dict.fromkeys(links.others, 0)

    def send(self, to: int, tensors: Sequence[torch.Tensor]) -> None:
        size = message_bytes([TensorSpec.of(tensor) for tensor in tensors])
        segment = self.links.segment(_roomy(size), frozenset((to,)))
        lay_out(tensors, segment.memory)
        self.links.offer(segment, size, to)

    def receive(self, source: int, specs: Sequence[TensorSpec]) -> Finish:
        number = self._received[source]
        self._received[source] += 1

        def finish() -> list[torch.Tensor]:
            segment, size = self.links.offered(source, number)
            try:
                names = self.links.name(source), self.links.name(self.links.rank)
                require_size(size, message_bytes(specs), *names)
                return [tensor.clone() for tensor in laid_out(segment.memory, specs)]
            finally:
                self.links.done(source, number)

        return finish

    def flush(self) -> None:
        """What was offered stays in its segment for who reads it, though this process ends."""
        self.links.flush()

    def close(self) -> None:
        self.links.close()


def _roomy(size: int) -> int:
    """A little more, so that messages whose lengths vary find a segment; what is never written takes no memory."""
    step = max(1, (1 << size.bit_length() - 1) // 8) if size else 1
    return -(-size // step) * step
