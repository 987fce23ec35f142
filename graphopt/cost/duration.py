"""How long a call takes: the roofline for what computes, rings for what moves between ranks.

Williams, Waterman and Patterson, "Roofline: an insightful visual performance model" (2009); Thakur, Rabenseifner and
Gropp, "Optimization of collective communication operations in MPICH" (2005).
"""

from torch import fx

from graphopt.cost.hardware import Hardware, Link
from graphopt.cost.operations import Work
from graphopt.ir.collectives import Collective
from graphopt.ir.values import byte_size


def compute_seconds(work: Work, hardware: Hardware) -> float:
    """The longer of computing and moving bytes, and the launch; nothing for what does nothing."""
    moved = work.read_bytes + work.written_bytes
    if not (work.flops or moved):
        return 0.0
    return max(work.flops / hardware.peak(work.dtype), moved / hardware.memory_bandwidth) + hardware.launch_seconds


def collective_seconds(collective: Collective, ranks: int, link: Link) -> float:
    """A ring of N ranks: in each of N-1 rounds every rank sends 1/N of the whole; an all-reduce has twice as many.

    All to all, every rank sends in each round what it has for another one: as much.
    """
    rounds = (ranks - 1) * (2 if collective.kind == "all-reduce" else 1)
    return rounds * link.latency + collective.sent_bytes(ranks) / link.bandwidth


def copy_seconds(value: fx.Node, place: str, hardware: Hardware) -> float:
    """Of a value to ``host`` or ``disk``, or back: latency of the link, and the bytes at its bandwidth."""
    link = hardware.link_to(place)
    return link.latency + byte_size(value.meta["val"]) / link.bandwidth
