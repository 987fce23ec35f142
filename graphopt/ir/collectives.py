"""The collectives of a program: what they move, over which axis, in which order."""

import hashlib
from dataclasses import dataclass

import torch
from torch import fx

from graphopt.ir.facts import Phase, facts_of
from graphopt.ir.program import Program
from graphopt.ir.values import byte_size, described

_functional = torch.ops._c10d_functional
_KINDS: dict[object, str] = {
    _functional.all_gather_into_tensor.default: "all-gather",
    _functional.all_gather_into_tensor_coalesced.default: "all-gather",
    _functional.reduce_scatter_tensor.default: "reduce-scatter",
    _functional.reduce_scatter_tensor_coalesced.default: "reduce-scatter",
    _functional.all_reduce.default: "all-reduce",
    _functional.all_reduce_coalesced.default: "all-reduce",
}


@dataclass(frozen=True)
class Collective:
    """One collective call.

    whole_bytes: size of the tensors on the side where they are whole.
    """

    node: fx.Node
    kind: str
    axis: str
    phase: Phase
    whole_bytes: int

    def sent_bytes(self, ranks: int) -> float:
        """Least bytes that each of `ranks` ranks sends: (N-1)/N of the whole, twice that for an all-reduce."""
        return self.whole_bytes * (ranks - 1) / ranks * (2 if self.kind == "all-reduce" else 1)


def collective_of(node: fx.Node) -> Collective | None:
    """The collective that a node launches, or None."""
    kind = _KINDS.get(node.target) if node.op == "call_function" else None
    if kind is None:
        return None
    whole = node.meta["val"] if kind == "all-gather" else [source.meta["val"] for source in sources_of(node)]
    return Collective(node, kind, str(node.args[-1]), facts_of(node).phase, byte_size(whole))


def sources_of(node: fx.Node) -> list[fx.Node]:
    """The nodes whose values a collective moves."""
    given = node.args[0]
    return [n for n in (given if isinstance(given, (list, tuple)) else [given]) if isinstance(n, fx.Node)]


def collectives_of(program: Program) -> list[Collective]:
    """All collectives in the order in which they are launched."""
    found = (collective_of(node) for node in program.graph.nodes)
    return [collective for collective in found if collective is not None]


def collective_signature(program: Program) -> str:
    """Digest of kinds, axes, ranks, sums, shapes and dtypes of all collectives in order: ranks must agree on it."""
    digest = hashlib.sha256()
    for collective in collectives_of(program):
        node = collective.node
        digest.update(f"{collective.kind} {node.args[1:]} {described(node.meta['val'])}\n".encode())
    return digest.hexdigest()
