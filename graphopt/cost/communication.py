"""What a step moves between ranks."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from graphopt.ir import Program
from graphopt.ir.collectives import collectives_of


@dataclass(frozen=True)
class Communication:
    """Calls and bytes of one step (forward and backward) by (collective, axis).

    Bytes are the least that each rank sends: (N-1)/N of what is whole, or of what it has to exchange all to all; twice
    that for an all-reduce.
    """

    calls: Mapping[tuple[str, str], int]
    bytes: Mapping[tuple[str, str], float]

    @property
    def total_bytes(self) -> float:
        return sum(self.bytes.values())

    def to_dict(self) -> dict[str, Any]:
        rows = [
            {"collective": kind, "axis": axis, "calls": self.calls[kind, axis], "bytes": self.bytes[kind, axis]}
            for kind, axis in self.calls
        ]
        return {"collectives": rows, "total_bytes": self.total_bytes}


def communication(program: Program, mesh: Mapping[str, int]) -> Communication:
    """Count the collectives of a step program over a mesh (axis name -> ranks)."""
    calls: Counter[tuple[str, str]] = Counter()
    moved: dict[tuple[str, str], float] = {}
    for collective in collectives_of(program):
        key = (collective.kind, collective.axis)
        calls[key] += 1
        moved[key] = moved.get(key, 0.0) + collective.sent_bytes(mesh[collective.axis])
    return Communication(dict(calls), moved)
