"""The memory of a step on one rank: what is alive after each node, and of which kind."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from graphopt.ir import InputKind, OutputKind, Phase, Program, facts_of
from graphopt.ir.collectives import collective_of, sources_of
from graphopt.ir.liveness import Interval, intervals, storage_of

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
    peak_bytes: the most bytes of all categories together; peak_node: after which node.
    timeline: bytes alive after each call node, in order.
    Optimizer state is not part of a step's program and not counted.
    """

    by_category: dict[str, int]
    peak_bytes: int
    peak_node: str
    timeline: list[int] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        return {"by_category": self.by_category, "peak_bytes": self.peak_bytes, "peak_node": self.peak_node}


def memory(program: Program) -> Memory:
    """Walk a step program: a value lives until its last use; inputs, outputs and resident values until the end."""
    inputs = _input_bytes(program)
    alive = dict(inputs)
    peak_of = dict(inputs)
    category = _categories(program)
    starts: dict[int, list[Interval]] = {}
    ends: dict[int, list[Interval]] = {}
    for interval in intervals(program):
        starts.setdefault(interval.first, []).append(interval)
        if interval.last is not None and not facts_of(interval.owner).resident:
            ends.setdefault(interval.last, []).append(interval)
    peak, peak_node, timeline = sum(inputs.values()), "inputs", []
    for index, node in enumerate(program.graph.nodes):
        if node.op != "call_function":
            continue
        for interval in starts.get(index, ()):
            kind = category.get(interval.owner, "temporaries")
            alive[kind] = alive.get(kind, 0) + _size(interval.owner.meta["val"])
            peak_of[kind] = max(peak_of.get(kind, 0), alive[kind])
        total = sum(alive.values())
        if total > peak:
            peak, peak_node = total, node.name
        for ended in ends.get(index, ()):
            alive[category.get(ended.owner, "temporaries")] -= _size(ended.owner.meta["val"])
        timeline.append(sum(alive.values()))
    return Memory({kind: size for kind, size in peak_of.items() if size}, peak, peak_node, timeline)


def _input_bytes(program: Program) -> dict[str, int]:
    """Bytes of the inputs by category. A shard that is part of its resident whole is counted there."""
    inside = _shards_of_residents(program)
    total: dict[str, int] = {}
    for role, node in zip(program.inputs, program.placeholders, strict=True):
        if node not in inside:
            kind = _INPUTS[role.kind]
            total[kind] = total.get(kind, 0) + _size(node.meta["val"])
    return total


def _shards_of_residents(program: Program) -> set[fx.Node]:
    found = set()
    for node in program.compute_nodes():
        collective = collective_of(node)
        if collective is not None and collective.kind == "all-gather" and facts_of(node).resident:
            found |= {source for source in sources_of(node) if source.op == "placeholder"}
    return found


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


def _size(value: Any) -> int:
    """Bytes of a tensor; symbols count with the sizes of the example."""
    if not isinstance(value, torch.Tensor):
        return 0
    elements = 1
    for size in value.shape:
        elements *= size if isinstance(size, int) else int(size.node.hint)
    return elements * value.element_size()
