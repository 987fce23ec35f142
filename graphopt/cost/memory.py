"""The memory of a step on one rank: what is alive after each node, and of which kind.

A storage lives from the node that allocates it to the last that reads it; `transfers` says what collectives need.
"""

import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from graphopt.cost.transfers import Life, Transfers
from graphopt.ir import InputKind, OutputKind, Phase, Program, facts_of
from graphopt.ir.collectives import collective_of, collectives_of, sources_of
from graphopt.ir.liveness import intervals, storage_of
from graphopt.ir.values import byte_size

_INPUTS = {
    InputKind.PARAMETER: "parameters",
    InputKind.SHARD: "parameters",
    InputKind.BUFFER: "buffers",
    InputKind.CONSTANT: "buffers",
    InputKind.BATCH: "batch",
    InputKind.TANGENT: "batch",
}


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank.

    by_category: the most bytes of each category that are alive at one time (parameters, gathered, gradients,
        activations, communication, segments of shared memory, buffers, batch, temporaries).
    peak_bytes: the most bytes of all categories together; peak_node: at which node.
    timeline: bytes alive after each call node, in order.
    Optimizer state is not part of a step's program and not counted.
    """

    by_category: dict[str, int]
    peak_bytes: int
    peak_node: str
    timeline: list[int] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        return {"by_category": self.by_category, "peak_bytes": self.peak_bytes, "peak_node": self.peak_node}


def memory(program: Program, mesh: Mapping[str, int], shared_axes: frozenset[str] = frozenset()) -> Memory:
    """Walk a step program: a value lives until its last use; inputs, outputs and resident values until the end.

    mesh: axis name -> number of ranks. shared_axes: those whose ranks exchange through shared memory.
    """
    transfers = Transfers(program, mesh, shared_axes)
    starts: defaultdict[int, list[Life]] = defaultdict(list)
    ends: defaultdict[int, list[Life]] = defaultdict(list)
    for life in itertools.chain(_inputs(program), _values(program, transfers), transfers.buffers()):
        starts[life.first].append(life)
        if life.last is not None:
            ends[life.last].append(life)
    alive: defaultdict[str, int] = defaultdict(int)
    most: defaultdict[str, int] = defaultdict(int)
    peak, peak_node, timeline = 0, "inputs", []
    for index, node in enumerate(program.graph.nodes):
        for life in starts[index]:
            alive[life.category] += life.size
            most[life.category] = max(most[life.category], alive[life.category])
        total = sum(alive.values())
        if total > peak:
            peak, peak_node = total, node.name if node.op == "call_function" else "inputs"
        for life in ends[index]:
            alive[life.category] -= life.size
        if node.op == "call_function":
            timeline.append(sum(alive.values()))
    return Memory({category: size for category, size in most.items() if size}, peak, peak_node, timeline)


def _inputs(program: Program) -> Iterator[Life]:
    """Inputs are there throughout. A shard that is a part of its resident whole is counted there."""
    inside = {
        source
        for collective in collectives_of(program)
        if collective.kind == "all-gather" and facts_of(collective.node).resident
        for source in sources_of(collective.node)
    }
    for role, node in zip(program.inputs, program.placeholders, strict=True):
        if node not in inside:
            yield Life(_INPUTS[role.kind], byte_size(node.meta["val"]), 0, None)


def _values(program: Program, transfers: Transfers) -> Iterator[Life]:
    """What calls allocate. Resident values are there before the step and after it."""
    category = _categories(program)
    for interval in intervals(program):
        owner = interval.owner
        first, last = (0, None) if facts_of(owner).resident else transfers.life_of(interval)
        yield Life(category.get(owner, "temporaries"), byte_size(owner.meta["val"]), first, last)


def _categories(program: Program) -> dict[fx.Node, str]:
    """The category of each storage, by the node that allocates it."""
    owner = storage_of(program)
    category: dict[fx.Node, str] = {}
    for node in program.compute_nodes():
        facts = facts_of(node)
        if facts.phase is Phase.BACKWARD:
            for source in node.all_input_nodes:
                if source.op == "call_function" and facts_of(source).phase is Phase.FORWARD:
                    category.setdefault(owner[source], "activations")
        collective = collective_of(node)
        if collective is not None:
            kind = "gathered" if collective.kind == "all-gather" else "communication"
            category.update(dict.fromkeys((owner[item] for item in node.users), kind))
    for _, result in program.results_of(OutputKind.GRADIENT, OutputKind.BATCH_GRADIENT):
        if result is not None:
            category[owner[result]] = "gradients"
    return category
