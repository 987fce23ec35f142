"""The collectives of a program: what they move, over which axis, in which order."""

import itertools
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from graphopt.errors import VerificationError
from graphopt.ir.dispatch import ROWS_BACK, ROWS_OUT
from graphopt.ir.facts import Phase, facts_of
from graphopt.ir.program import Program
from graphopt.ir.values import byte_size, described

_functional = torch.ops._c10d_functional
WAIT = _functional.wait_tensor.default
_KINDS: dict[object, str] = {
    _functional.all_gather_into_tensor.default: "all-gather",
    _functional.all_gather_into_tensor_coalesced.default: "all-gather",
    _functional.reduce_scatter_tensor.default: "reduce-scatter",
    _functional.reduce_scatter_tensor_coalesced.default: "reduce-scatter",
    _functional.all_reduce.default: "all-reduce",
    _functional.all_reduce_coalesced.default: "all-reduce",
    _functional.all_to_all_single.default: "all-to-all",
    ROWS_OUT: "dispatch",
    ROWS_BACK: "combine",
}
_REDUCING = frozenset({"reduce-scatter", "all-reduce"})


@dataclass(frozen=True)
class Collective:
    """One collective call.

    whole_bytes: size of the tensors on the side where they are whole; all to all, of what a rank has; of rows that are
        dispatched, on the side of those that have them all, which is what moves where groups are equal.
    """

    node: fx.Node
    kind: str
    axis: str
    phase: Phase
    whole_bytes: int

    @property
    def reduction(self) -> str | None:
        """What becomes of the values of all ranks, such as ``sum`` or ``max``; None if each stays as it is."""
        return str(self.node.args[1]) if self.kind in _REDUCING else None

    def sent_bytes(self, ranks: int) -> float:
        """Least bytes that each of `ranks` ranks sends: (N-1)/N of the whole, twice that for an all-reduce."""
        return self.whole_bytes * (ranks - 1) / ranks * (2 if self.kind == "all-reduce" else 1)


def collective_of(node: fx.Node) -> Collective | None:
    """The collective that a node launches, or None."""
    kind = _KINDS.get(node.target) if node.op == "call_function" else None
    if kind is None:
        return None
    whole = (
        node.meta["val"] if kind in ("all-gather", "combine") else [source.meta["val"] for source in sources_of(node)]
    )
    return Collective(node, kind, str(node.args[-1]), facts_of(node).phase, byte_size(whole))


def sources_of(node: fx.Node) -> list[fx.Node]:
    """The nodes whose values a collective moves."""
    given = node.args[0]
    return [n for n in (given if isinstance(given, (list, tuple)) else [given]) if isinstance(n, fx.Node)]


def uncast(value: fx.Node) -> fx.Node:
    """What a value is a cast of; itself if it is none."""
    while value.target is torch.ops.aten._to_copy.default and isinstance(value.args[0], fx.Node):
        value = value.args[0]
    return value


def waits_of(node: fx.Node) -> list[fx.Node]:
    """The nodes that wait for what a collective launched, in execution order."""
    items = node.users if isinstance(node.meta["val"], (list, tuple)) else [node]
    return sorted(wait for item in items for wait in item.users)


def summand_of(value: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """What each rank adds to a value, and the sums that nothing else reads, the last first; itself if it is no sum."""
    sums = []
    while value.target is WAIT and isinstance(launched := value.args[0], fx.Node):
        if launched.target is not _functional.all_reduce.default or launched.args[1] != "sum" or len(value.users) > 1:
            break
        (value,) = sources_of(launched)
        sums.append(launched)
    return value, sums


def launch_of(node: fx.Node) -> tuple[Collective, int] | None:
    """The collective whose result, or whose item of that number, a node is; None for any other node."""
    index = 0
    launched = node
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        launched, index = node.args[0], int(str(node.args[1]))
    collective = collective_of(launched)
    return None if collective is None else (collective, index)


def collectives_of(program: Program) -> list[Collective]:
    """All collectives in the order in which they are launched."""
    found = (collective_of(node) for node in program.graph.nodes)
    return [collective for collective in found if collective is not None]


def collective_calls(program: Program) -> list[str]:
    """Kind, arguments, results and members of all collectives in order, a line each: ranks must agree on it."""
    return [_call(collective) for collective in collectives_of(program)]


def _call(collective: Collective) -> str:
    node = collective.node
    members = ", ".join(source.name for source in sources_of(node))
    return f"{collective.kind} {node.args[1:]} of {members} to {described(node.meta['val'])}"


def first_difference(calls: Sequence[Sequence[str]]) -> str | None:
    """Where the collectives of some rank are no longer those of the first, in words; None if they are all the same."""
    for rank, others in enumerate(calls):
        for index, (one, other) in enumerate(itertools.zip_longest(calls[0], others, fillvalue="nothing more")):
            if one != other:
                return f"as collective {index} rank 0 calls {one}, rank {rank} {other}"
    return None


def check_ranks(programs: Sequence[Program]) -> None:
    """Raises VerificationError if the programs of the ranks, in order, do not call the same collectives."""
    difference = first_difference([collective_calls(program) for program in programs])
    if difference is not None:
        raise VerificationError(f"the ranks would wait for each other: {difference}")
