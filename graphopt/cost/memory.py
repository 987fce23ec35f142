"""The memory of a step on one rank: what is alive after each node, and of which kind.

A storage lives from the node that allocates it to the last that reads it. What travels is packed: a collective of
several tensors moves one buffer, which lives until it is waited for, and only then gives its results their own storage.
"""

import itertools
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from graphopt.ir import InputKind, OutputKind, Phase, Program, facts_of
from graphopt.ir.collectives import Collective, collective_of, collectives_of, sources_of
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
        activations, communication, buffers, batch, temporaries).
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


@dataclass(frozen=True)
class _Life:
    """Bytes alive from position `first` of the graph through `last`; None: to the end."""

    category: str
    size: int
    first: int
    last: int | None


def memory(program: Program) -> Memory:
    """Walk a step program: a value lives until its last use; inputs, outputs and resident values until the end."""
    starts: defaultdict[int, list[_Life]] = defaultdict(list)
    ends: defaultdict[int, list[_Life]] = defaultdict(list)
    for life in itertools.chain(_inputs(program), _values(program), _transfers(program)):
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


def _inputs(program: Program) -> Iterator[_Life]:
    """Inputs are there throughout. A shard that is a part of its resident whole is counted there."""
    inside = {
        source
        for collective in collectives_of(program)
        if collective.kind == "all-gather" and facts_of(collective.node).resident
        for source in sources_of(collective.node)
    }
    for role, node in zip(program.inputs, program.placeholders, strict=True):
        if node not in inside:
            yield _Life(_INPUTS[role.kind], byte_size(node.meta["val"]), 0, None)


def _values(program: Program) -> Iterator[_Life]:
    """What calls allocate. Resident values are there before the step and after it."""
    category = _categories(program)
    position = {node: index for index, node in enumerate(program.graph.nodes)}
    for interval in intervals(program):
        owner, first, last = interval.owner, interval.first, interval.last
        source = owner.args[0] if owner.args else None
        collective = collective_of(source) if isinstance(source, fx.Node) else None
        if facts_of(owner).resident:
            first, last = 0, None
        elif collective is not None and not _lands_in_place(collective):
            first = _awaited(collective, position)
        yield _Life(category.get(owner, "temporaries"), byte_size(owner.meta["val"]), first, last)


def _transfers(program: Program) -> Iterator[_Life]:
    """The buffers of collectives in flight, from launch to wait.

    Several tensors leave packed in one copy, and are gathered packed; one tensor to be summed is itself held on to.
    On the CPU a sum is an exchange all to all, which arrives in as much as left.
    """
    position = {node: index for index, node in enumerate(program.graph.nodes)}
    for collective in collectives_of(program):
        if _lands_in_place(collective):
            continue
        launch, wait = position[collective.node], _awaited(collective, position)
        sources = [source.meta["val"] for source in sources_of(collective.node)]
        yield _Life("communication", byte_size(sources), launch if len(sources) > 1 else launch + 1, wait)
        if collective.kind == "all-gather" or sources[0].device.type == "cpu":
            yield _Life("communication", collective.whole_bytes, launch, wait)


def _lands_in_place(collective: Collective) -> bool:
    """One tensor is gathered straight into its result; several arrive packed."""
    return collective.kind == "all-gather" and len(sources_of(collective.node)) == 1


def _awaited(collective: Collective, position: dict[fx.Node, int]) -> int:
    """Where a collective is first waited for."""
    node = collective.node
    items = list(node.users) if isinstance(node.meta["val"], (list, tuple)) else [node]
    return min(position[wait] for item in items for wait in item.users)


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
