"""What is in a rank's memory during a step, storage by storage: of which kind, how large, from when to when.

A storage lives from the node that allocates it to the last that reads it; `transfers` says what collectives need.
"""

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import fx

from graphopt.cost.sizes import Size, Sizes
from graphopt.cost.transfers import Life, Transfers
from graphopt.ir import InputKind, OutputKind, Phase, Program, facts_of
from graphopt.ir.collectives import collective_of, collectives_of, sources_of
from graphopt.ir.copies import COPY_IN, COPY_OUT, copy_of
from graphopt.ir.liveness import intervals, storage_of
from graphopt.ir.roles import GRADIENTS

_INPUTS = {
    InputKind.PARAMETER: "parameters",
    InputKind.SHARD: "parameters",
    InputKind.BUFFER: "buffers",
    InputKind.CONSTANT: "buffers",
    InputKind.BATCH: "batch",
    InputKind.TANGENT: "batch",
    InputKind.RECEIVED: "batch",
    InputKind.SAVED: "activations",
}


@dataclass(frozen=True)
class OptimizerState:
    """What an optimizer keeps on a rank for each parameter that it trains, or for its shard.

    tensors: how many of the parameter's shape. dtype: theirs; None for that of the parameter. scalars: how many
        float32 numbers beside them (a step count).
    """

    tensors: int
    dtype: torch.dtype | None = None
    scalars: int = 0


# As torch's optimizers keep it.
OPTIMIZERS: Mapping[str, OptimizerState] = MappingProxyType(
    {
        "adamw": OptimizerState(tensors=2, scalars=1),
        "momentum": OptimizerState(tensors=1),
        "sgd": OptimizerState(tensors=0),
    }
)


@dataclass(frozen=True)
class Around:
    """What is in memory beside what a step's program makes and reads.

    optimizer: whose state is there. accumulates: whether gradients of an earlier backward are, to which this one adds.
    """

    optimizer: OptimizerState | None = None
    accumulates: bool = False


def lives_of(
    program: Program, mesh: Mapping[str, int], shared_axes: frozenset[str], sizes: Sizes[Size], around: Around
) -> list[Life[Size]]:
    """Everything that is alive at some time of a step program.

    mesh: axis -> ranks. shared_axes: those that exchange through shared memory. sizes: how bytes are counted.
    """
    storages = intervals(program)
    transfers = Transfers(program, storages, sizes, mesh, shared_axes)
    owner = storage_of(program)
    category = _categories(program, owner)
    copied = _last_of_new_buffers(program, owner)
    held = _lists(program, owner)
    lives = [*inputs_of_step(program, sizes), *_trained(program, sizes, around)]
    for interval in storages:
        node = interval.owner
        if facts_of(node).outside:
            continue
        first, last = (0, None) if facts_of(node).resident else transfers.life_of(interval)
        last = copied.get(node, last)
        if last is not None and node.args and node.args[0] in held:
            last = max(last, held[node.args[0]][1])  # type: ignore[index]
        lives.append(Life(node.name, category.get(node, "temporaries"), sizes.storage(node), first, last))
    lives += _unread(held, sizes)
    lives += transfers.buffers()
    return lives


def lives_elsewhere(program: Program, sizes: Sizes[Size]) -> list[Life[Size]]:
    """What is kept in files, or on the host beside a device with memory of its own; the category is the place."""
    if not program.graph.find_nodes(op="call_function", target=COPY_IN):
        return []
    lives = [
        Life(each.owner.name, copy_of(each.owner).place, sizes.storage(each.owner), each.first, each.last)
        for each in intervals(program)
        if facts_of(each.owner).outside
    ]
    for node in program.placeholders:
        if facts_of(node).outside:
            lives.append(Life(node.name, copy_of(next(iter(node.users))).place, sizes.tensor(node), 0, None))
    return lives


def inputs_of_step(program: Program, sizes: Sizes[Size]) -> Iterator[Life[Size]]:
    """Inputs are there throughout, gradients of outputs from the start of backward.

    A shard that is a part of its resident whole is counted there. Where a backward may have to replay forward, buffers
    that forward updates are there a second time, as they were before.
    """
    inside = {
        source
        for collective in collectives_of(program)
        if collective.kind == "all-gather" and facts_of(collective.node).resident
        for source in sources_of(collective.node)
    }
    backward = program.compute_nodes(Phase.BACKWARD)
    turn = next((i for i, node in enumerate(program.graph.nodes) if backward and node is backward[0]), 0)
    updated = {role.name for role, _ in program.results_of(OutputKind.BUFFER)} if backward else set()
    for role, node in zip(program.inputs, program.placeholders, strict=True):
        if node in inside or facts_of(node).outside or not isinstance(node.meta["val"], torch.Tensor):
            continue
        yield Life(node.name, _INPUTS[role.kind], sizes.tensor(node), turn * (role.kind is InputKind.TANGENT), None)
        if role.kind is InputKind.BUFFER and role.name in updated:
            yield Life(node.name, "buffers", sizes.tensor(node), 0, None)


def _trained(program: Program, sizes: Sizes[Size], around: Around) -> Iterator[Life[Size]]:
    """Optimizer state, and gradients that were there before."""
    if around == Around():
        return
    parameters = {role.name: node for role, node in program.nodes_of(InputKind.PARAMETER, InputKind.SHARD)}
    for role, gradient in program.results_of(OutputKind.GRADIENT):
        if gradient is None:
            continue
        node = parameters[role.name]
        if around.accumulates:
            yield Life(node.name, "gradients", sizes.tensor(node), 0, None)
        state = around.optimizer
        if state is not None:
            dtype = node.meta["val"].dtype if state.dtype is None else state.dtype
            for _ in range(state.tensors):
                yield Life(node.name, "optimizer", sizes.in_dtype(node, dtype), 0, None)
            for _ in range(state.scalars):
                yield Life(node.name, "optimizer", sizes.scalar(torch.float32), 0, None)


def _lists(program: Program, owner: Mapping[fx.Node, fx.Node]) -> dict[fx.Node, tuple[int, int]]:
    """Calls that give several new tensors: where they are, and where the last is taken; until then all are held."""
    held: dict[fx.Node, tuple[int, int]] = {}
    for position, node in enumerate(program.graph.nodes):
        if node.target is operator.getitem and node.args[0] in held:
            held[node.args[0]] = (held[node.args[0]][0], position)
        elif isinstance(node.meta.get("val"), (list, tuple)) and owner[node] is node and collective_of(node) is None:
            held[node] = (position, position)
    return held


def _unread(held: Mapping[fx.Node, tuple[int, int]], sizes: Sizes[Size]) -> Iterator[Life[Size]]:
    """Results that nobody takes, for instance statistics of a norm that backward computes again."""
    for node, (first, last) in held.items():
        taken = {user.args[1] for user in node.users}
        for index, value in enumerate(node.meta["val"]):
            if isinstance(value, torch.Tensor) and index not in taken:
                yield Life(node.name, "temporaries", sizes.value(value), first, last)


def _last_of_new_buffers(program: Program, owner: Mapping[fx.Node, fx.Node]) -> dict[fx.Node, int]:
    """Where new values of buffers end: when forward has, they are copied to the buffers; later if backward reads them.

    Those that are also returned stay to the end and are left out.
    """
    kept = {owner[node] for role, node in _results(program) if role is not OutputKind.BUFFER}
    fresh = {owner[node] for role, node in _results(program) if role is OutputKind.BUFFER} - kept
    last: dict[fx.Node, int] = {}
    if fresh:
        end = 0
        for position, node in enumerate(program.graph.nodes):
            if node.op != "call_function":
                continue
            if facts_of(node).phase is Phase.FORWARD:
                end = position
            read = {owner[source] for source in node.all_input_nodes} & fresh
            last.update(dict.fromkeys(read, position))
        last = {node: max(end, last.get(node, 0)) for node in fresh}
    return last


def _results(program: Program) -> list[tuple[OutputKind, fx.Node]]:
    return [(role.kind, node) for role, node in zip(program.outputs, program.results, strict=True) if node is not None]


def _categories(program: Program, owner: Mapping[fx.Node, fx.Node]) -> dict[fx.Node, str]:
    """The category of each storage, by the node that allocates it."""
    category: dict[fx.Node, str] = {}
    for node in program.compute_nodes():
        facts = facts_of(node)
        if facts.phase is Phase.BACKWARD:
            for source in node.all_input_nodes:
                if source.op == "call_function" and facts_of(source).phase is Phase.FORWARD:
                    category.setdefault(owner[source], "activations")
        collective = collective_of(node)
        if collective is not None and isinstance(node.meta["val"], (list, tuple)):  # else a value of the model, moved
            kind = "gathered" if collective.kind == "all-gather" else "communication"
            category.update(dict.fromkeys((owner[item] for item in node.users), kind))
        elif node.target is COPY_OUT:
            category[node] = copy_of(node).place
        elif node.target is COPY_IN:
            category[node] = "activations"
    for role, result in _results(program):
        if role in GRADIENTS:
            category[owner[result]] = "gradients"
        elif category.get(owner[result], "activations") == "activations":
            category[owner[result]] = "outputs"
    return category
