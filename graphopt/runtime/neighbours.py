"""Links between ranks that find each other on one machine."""

import contextlib
import logging
import os
import secrets
import socket
import struct

import torch.distributed as dist

from graphopt.runtime.agreement import exchanged
from graphopt.runtime.alarm import Look, unwatched
from graphopt.runtime.links import Links

log = logging.getLogger("graphopt")
_CONNECT_SECONDS = 60


def linked(group: dist.ProcessGroup, look: Look = unwatched) -> Links | None:
    """Links between the ranks of a group, if all run on this machine; all ranks call this together.

    look: called now and then in a long wait; what it raises ends that.
    """
    listener = _listen()
    with listener or contextlib.nullcontext():
        address = listener.getsockname() if listener else b""
        places = exchanged((_machine() if listener else None, address), group)
        machines = {machine for machine, _ in places}
        if len(machines) > 1 or None in machines:
            log.info("ranks exchange through the process group: not all ranks share one machine's memory")
            return None
        rank, error = dist.get_rank(group), None
        neighbours: dict[int, socket.socket] = {}
        try:
            assert listener is not None
            neighbours = _connected(listener, rank, [address for _, address in places])
        except OSError as caught:
            error = str(caught)
    errors = [each for each in exchanged(error, group) if each is not None]
    if errors:
        log.warning("ranks exchange through the process group: sharing memory failed: %s", errors[0])
        for neighbour in neighbours.values():
            neighbour.close()
        return None
    return Links(rank, neighbours, dist.get_process_group_ranks(group), look)


def _machine() -> tuple[str, int]:
    """Equal for processes that can reach each other by a local socket: one kernel, one network namespace."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read(), os.stat("/proc/self/ns/net").st_ino


def _listen() -> socket.socket | None:
    """A socket at an abstract address (Linux), which leaves no file behind."""
    if not hasattr(os, "memfd_create"):
        return None
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(f"\0graphopt-{secrets.token_hex(16)}")
    listener.listen(1024)
    return listener


def _connected(listener: socket.socket, rank: int, addresses: list[bytes]) -> dict[int, socket.socket]:
    """A socket to every other rank: connects to those below, and is called by those above."""
    neighbours: dict[int, socket.socket] = {}
    for other in range(rank):
        caller = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        caller.settimeout(_CONNECT_SECONDS)
        caller.connect(addresses[other])
        caller.send(struct.pack("<Q", rank))
        neighbours[other] = caller
    listener.settimeout(_CONNECT_SECONDS)
    while len(neighbours) < len(addresses) - 1:
        called, _ = listener.accept()
        called.settimeout(_CONNECT_SECONDS)
        if _user_of(called) != os.getuid():
            called.close()
            continue
        (other,) = struct.unpack("<Q", called.recv(8))
        neighbours[other] = called
    for neighbour in neighbours.values():
        neighbour.setblocking(True)
    return dict(sorted(neighbours.items()))


def _user_of(connection: socket.socket) -> int:
    """The user on the other side, as the kernel knows it."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", credentials)[1])
