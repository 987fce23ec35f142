"""Copies to memory elsewhere (of the host, or in files) and back, as launches and waits.

    leaving = copy_out(value, "host")          starts
    kept = copied_out(leaving, value)          waits; until then the value stays where it is
    arriving = copy_in(kept, device, "host")   starts, into new memory of the device
    value = copied_in(arriving, kept)          waits; until then the copy stays where it is

Each launch is waited for once. What the four give is one and the same value, in the same strides. Inputs of a program
may be elsewhere from the start, and gradients may stay there.
"""

from dataclasses import dataclass

import torch
from torch import fx

from graphopt.ir.program import Program

PLACES = ("host", "disk")

_library = torch.library.Library("graphopt", "FRAGMENT")
_library.define("copy_out(Tensor value, str place) -> Tensor")
_library.define("copied_out(Tensor leaving, Tensor value) -> Tensor")
_library.define("copy_in(Tensor kept, Device device, str place) -> Tensor")
_library.define("copied_in(Tensor arriving, Tensor kept) -> Tensor")


def _copy_out(value: torch.Tensor, place: str) -> torch.Tensor:
    return torch.empty_like(value, device="cpu")


def _copy_in(kept: torch.Tensor, device: torch.device, place: str) -> torch.Tensor:
    return torch.empty_like(kept, device=device)


def _awaited(launched: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    return launched


# For whoever runs a graph call by call; emitted programs copy beside what they compute (graphopt.runtime.copies).
_library.impl("copy_out", lambda value, place: _copy_out(value, place).copy_(value), "CompositeExplicitAutograd")
_library.impl("copy_in", lambda kept, *where: _copy_in(kept, *where).copy_(kept), "CompositeExplicitAutograd")
for _name, _fake in (("copy_out", _copy_out), ("copy_in", _copy_in)):
    torch.library.register_fake(f"graphopt::{_name}", _fake, lib=_library)
for _name in ("copied_out", "copied_in"):
    _library.impl(_name, _awaited, "CompositeExplicitAutograd")
    torch.library.register_fake(f"graphopt::{_name}", _awaited, lib=_library)

COPY_OUT = torch.ops.graphopt.copy_out.default
COPIED_OUT = torch.ops.graphopt.copied_out.default
COPY_IN = torch.ops.graphopt.copy_in.default
COPIED_IN = torch.ops.graphopt.copied_in.default
COPY_LAUNCHES: frozenset[object] = frozenset({COPY_OUT, COPY_IN})
COPY_WAITS: frozenset[object] = frozenset({COPIED_OUT, COPIED_IN})
COPIES = COPY_LAUNCHES | COPY_WAITS


@dataclass(frozen=True)
class Copy:
    """One copy. launch, wait: its nodes. place: ``host`` or ``disk``. is_out: to there, else back."""

    launch: fx.Node
    wait: fx.Node
    place: str
    is_out: bool

    @property
    def link(self) -> str:
        """What it travels over: copies of one link follow each other."""
        return f"to {self.place}" if self.is_out else f"from {self.place}"


def copies_of(program: Program) -> list[Copy]:
    """All copies, in the order in which they are launched."""
    return [copy_of(node) for node in program.graph.nodes if node.target in COPY_LAUNCHES]


def copy_of(launch: fx.Node) -> Copy:
    """The copy that a call launches."""
    is_out = launch.target is COPY_OUT
    return Copy(launch, next(iter(launch.users)), str(launch.args[-1]), is_out)
