"""Rules of collectives: launched over an axis that is there, waited for once, read only then, dropped when meant to."""

import operator
from collections.abc import Iterator, Mapping

import torch
from torch import fx

from graphopt.ir.collectives import WAIT, Collective, collectives_of, launch_of, sources_of, uncast, waits_of
from graphopt.ir.copies import COPIED_IN
from graphopt.ir.facts import Phase, facts_of
from graphopt.ir.program import Program
from graphopt.ir.roles import InputKind


def transfer_problems(program: Program, mesh: Mapping[str, int]) -> Iterator[tuple[fx.Node, str]]:
    """Each node that breaks a rule, with what it does."""
    for node in program.graph.find_nodes(op="call_function", target=WAIT):
        if not isinstance(node.args[0], fx.Node) or launch_of(node.args[0]) is None:
            yield node, f"waits for {node.args[0]}, which no collective launched"
    shards = {node for _, node in program.nodes_of(InputKind.SHARD)}
    for collective in collectives_of(program):
        yield from _argument_problems(collective, mesh)
        yield from _waiting_problems(collective.node)
        if collective.kind == "all-gather" and any(_stored(source) in shards for source in sources_of(collective.node)):
            yield from _lifetime_problems(collective.node)


def _stored(value: fx.Node) -> fx.Node:
    """What a value is a cast of, or has been copied back from."""
    value = uncast(value)
    while value.target is COPIED_IN and isinstance(value.args[1], fx.Node):
        value = uncast(value.args[1])
    return value


def _argument_problems(collective: Collective, mesh: Mapping[str, int]) -> Iterator[tuple[fx.Node, str]]:
    node, axis = collective.node, collective.axis
    if axis not in mesh:
        yield node, f"runs over axis {axis!r}; the mesh has {', '.join(mesh) or 'none'}"
        return
    if collective.kind == "all-to-all":
        if node.args[1] != node.args[2] or len(node.args[1]) != mesh[axis]:  # type: ignore[arg-type]
            yield node, f"exchanges {node.args[2]} for {node.args[1]} rows on axis {axis}, which has {mesh[axis]} ranks"
    elif collective.kind != "all-reduce" and node.args[-2] != mesh[axis]:
        yield node, f"counts {node.args[-2]} ranks on axis {axis}, which has {mesh[axis]}"
    allowed = ("sum", "max") if collective.kind == "all-reduce" and collective.phase is Phase.FORWARD else ("sum",)
    if collective.reduction is not None and collective.reduction not in allowed:
        yield node, f"reduces by {collective.reduction!r}; gradients are summed"


def _waiting_problems(node: fx.Node) -> Iterator[tuple[fx.Node, str]]:
    value, transfers = node.meta["val"], [node]
    if isinstance(value, (list, tuple)):
        transfers = list(node.users)
        readers = [user.name for user in transfers if user.target is not operator.getitem]
        if readers:
            yield node, f"launches a list of transfers, which {', '.join(readers)} reads whole; take its items"
            return
        if sorted(int(str(item.args[1])) for item in transfers) != list(range(len(value))):
            yield node, f"launches {len(value)} transfers, and its items are not taken exactly once each"
    for transfer in transfers:
        waits = [user for user in transfer.users if user.target is WAIT]
        if len(waits) != 1:
            yield transfer, f"is waited for {len(waits)} times; a collective is waited for exactly once"
        others = [user.name for user in transfer.users if user.target is not WAIT]
        if others:
            yield transfer, f"is read by {', '.join(others)} before it is waited for"


def _lifetime_problems(node: fx.Node) -> Iterator[tuple[fx.Node, str]]:
    """A parameter gathered for one phase is not read in the other; launch, item and wait agree how long it lives."""
    facts = facts_of(node)
    items = list(node.users) if isinstance(node.meta["val"], (list, tuple)) else []
    for value in [*items, *waits_of(node)]:
        if (facts_of(value).resident, facts_of(value).kept) != (facts.resident, facts.kept):
            yield value, f"is to live otherwise than {node.name}, which launched it"
    if facts.resident or facts.kept or facts.phase is Phase.BACKWARD:
        return
    for wait in waits_of(node):
        late = next((user for user in _readers(wait) if facts_of(user).phase is Phase.BACKWARD), None)
        if late is not None:
            yield late, f"reads {wait.name} in backward, which was gathered for forward alone"


def _readers(value: fx.Node) -> Iterator[fx.Node]:
    """What reads a value, or a view that only gives it its shape."""
    for user in value.users:
        if user.target in (torch.ops.aten.slice.Tensor, torch.ops.aten.view.default):
            yield from _readers(user)
        yield user
