"""The memory of a step on one rank: what is alive after each node, and of which kind.

A storage lives from the node that allocates it to the last that reads it; `transfers` says what collectives need.
"""

import itertools
from collections import Counter, defaultdict
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
    lives: what is alive from where to where, in positions of the graph's nodes; peak_position: that of the peak.
    Optimizer state is not part of a step's program and not counted.
    """

    by_category: dict[str, int]
    peak_bytes: int
    peak_node: str
    peak_position: int
    timeline: list[int] = field(repr=False)
    lives: list[Life] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        return {"by_category": self.by_category, "peak_bytes": self.peak_bytes, "peak_node": self.peak_node}

    def at_peak(self) -> list[Life]:
        """What is alive at the peak, largest first."""
        at = self.peak_position
        alive = [life for life in self.lives if life.first <= at and (life.last is None or life.last >= at)]
        return sorted(alive, key=lambda life: -life.size)

    def steps(self) -> dict[str, list[tuple[int, int]]]:
        """For each category, the positions where its bytes change, with the bytes from there on."""
        change: defaultdict[str, Counter[int]] = defaultdict(Counter)
        for life in self.lives:
            change[life.category][life.first] += life.size
            if life.last is not None:
                change[life.category][life.last + 1] -= life.size
        found = {}
        for category, changes in change.items():
            positions = sorted(position for position, size in changes.items() if size)
            found[category] = list(zip(positions, itertools.accumulate(changes[p] for p in positions), strict=True))
        return found


def memory(program: Program, mesh: Mapping[str, int], shared_axes: frozenset[str] = frozenset()) -> Memory:
    """Walk a step program: a value lives until its last use; inputs, outputs and resident values until the end.

    mesh: axis name -> number of ranks. shared_axes: those whose ranks exchange through shared memory.
    """
    transfers = Transfers(program, mesh, shared_axes)
    starts: defaultdict[int, list[Life]] = defaultdict(list)
    ends: defaultdict[int, list[Life]] = defaultdict(list)
    lives = [*_inputs(program), *_values(program, transfers), *transfers.buffers()]
    for life in lives:
        starts[life.first].append(life)
        if life.last is not None:
            ends[life.last].append(life)
    alive: defaultdict[str, int] = defaultdict(int)
    most: defaultdict[str, int] = defaultdict(int)
    peak, peak_node, peak_position, timeline = 0, "inputs", 0, []
    for index, node in enumerate(program.graph.nodes):
        for life in starts[index]:
            alive[life.category] += life.size
            most[life.category] = max(most[life.category], alive[life.category])
        total = sum(alive.values())
        if total > peak:
            peak, peak_position = total, index
            peak_node = node.name if node.op == "call_function" else "inputs"
        for life in ends[index]:
            alive[life.category] -= life.size
        if node.op == "call_function":
            timeline.append(sum(alive.values()))
    by_category = {category: size for category, size in most.items() if size}
    return Memory(by_category, peak, peak_node, peak_position, timeline, lives)


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
            yield Life(node.name, _INPUTS[role.kind], byte_size(node.meta["val"]), 0, None)


def _values(program: Program, transfers: Transfers) -> Iterator[Life]:
    """What calls allocate. Resident values are there before the step and after it."""
    category = _categories(program)
    for interval in intervals(program):
        owner = interval.owner
        first, last = (0, None) if facts_of(owner).resident else transfers.life_of(interval)
        yield Life(owner.name, category.get(owner, "temporaries"), byte_size(owner.meta["val"]), first, last)


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
