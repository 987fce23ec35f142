"""What is always true of a program, checked."""

import operator
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from graphopt._torch import FakeTensorMode
from graphopt.errors import VerificationError
from graphopt.ir.collectives import collective_of
from graphopt.ir.effects import Effect, effect_of
from graphopt.ir.facts import Phase, facts_of
from graphopt.ir.printer import format_node
from graphopt.ir.program import Level, Program
from graphopt.ir.roles import InputKind, OutputKind
from graphopt.ir.values import described

_WAIT = torch.ops._c10d_functional.wait_tensor.default
_AROUND = 10


def verify(program: Program, fake_mode: FakeTensorMode) -> None:
    """Check `program` against the rules of its level. Raises VerificationError with the rule and the nodes around.

    Roles match inputs and outputs; nodes read only what stands before them, and forward nodes nothing of backward;
    values have the shapes and dtypes that the operators give; nothing is written in place; each collective is waited
    for exactly once, before its result is read, and nothing else is waited for.
    """
    _check_roles(program)
    try:
        program.graph.lint()
    except (RuntimeError, AssertionError) as error:
        raise VerificationError(f"the graph is malformed: {error}") from error
    late = _available_late(program)
    for node in program.graph.nodes:
        for problem in _problems(node, late):
            raise VerificationError(f"{problem}\n{surroundings(node)}")
    _check_values(program, fake_mode)


def surroundings(node: fx.Node) -> str:
    """Ten nodes on each side, `node` marked."""
    nodes = list(node.graph.nodes)
    at = nodes.index(node)
    return "\n".join(
        f"{'>' if n is node else ' '} {format_node(n)}" for n in nodes[max(0, at - _AROUND) : at + _AROUND + 1]
    )


def _check_roles(program: Program) -> None:
    placeholders, results = program.placeholders, program.results
    if len(placeholders) != len(program.inputs):
        raise VerificationError(f"{len(placeholders)} inputs have {len(program.inputs)} roles")
    if len(results) != len(program.outputs):
        raise VerificationError(f"{len(results)} outputs have {len(program.outputs)} roles")
    for what, roles in (("input", Counter(program.inputs)), ("output", Counter(program.outputs))):
        for role, count in roles.items():
            if count > 1:
                raise VerificationError(f"{count} {what}s have the role '{role}'")
    for role, node in zip(program.outputs, results, strict=True):
        if node is None and role.kind not in (OutputKind.GRADIENT, OutputKind.BATCH_GRADIENT):
            raise VerificationError(f"output '{role}' has no value; only a gradient may be missing")
    for role in program.inputs:
        if role.kind is InputKind.CONSTANT and role.name not in program.constants:
            raise VerificationError(f"input '{role}' has no value among the program's constants")
    late = _available_late(program)
    for role, node in program.results_of(OutputKind.USER, OutputKind.BUFFER, OutputKind.SAVED):
        if node in late:
            raise VerificationError(f"output '{role}' is {node.name} of the backward phase; forward returns it")


def _available_late(program: Program) -> set[fx.Node]:
    """What exists only once backward runs: its nodes, and the gradients that arrive."""
    if program.level is not Level.STEP:
        return set()
    return {*program.compute_nodes(Phase.BACKWARD), *(node for _, node in program.nodes_of(InputKind.TANGENT))}


def _problems(node: fx.Node, late: set[fx.Node]) -> Iterator[str]:
    if node.op not in ("call_function", "placeholder", "output"):
        yield f"{node.name} is a {node.op} node; programs hold inputs and calls only"
    if node.op != "call_function":
        return
    if facts_of(node).phase is Phase.FORWARD and not late.isdisjoint(node.all_input_nodes):
        read = ", ".join(source.name for source in node.all_input_nodes if source in late)
        yield f"{node.name} is a forward node and reads {read} of the backward phase"
    if effect_of(node) is Effect.MUTATING:
        yield f"{node.name} writes one of its arguments; programs are functional"
    yield from _waiting_problems(node)


def _waiting_problems(node: fx.Node) -> Iterator[str]:
    if node.target is _WAIT and not _is_transfer(node.args[0]):
        yield f"{node.name} waits for {node.args[0]}, which no collective launched"
    if collective_of(node) is None:
        return
    value, transfers = node.meta["val"], [node]
    if isinstance(value, (list, tuple)):
        transfers = list(node.users)
        readers = [user.name for user in transfers if user.target is not operator.getitem]
        if readers:
            yield f"{node.name} launches a list of transfers, which {', '.join(readers)} reads whole; take its items"
            return
        if sorted(int(str(item.args[1])) for item in transfers) != list(range(len(value))):
            yield f"{node.name} launches {len(value)} transfers, and its items are not taken exactly once each"
    for transfer in transfers:
        waits = [user for user in transfer.users if user.target is _WAIT]
        if len(waits) != 1:
            yield f"{transfer.name} is waited for {len(waits)} times; a collective is waited for exactly once"
        others = [user.name for user in transfer.users if user.target is not _WAIT]
        if others:
            yield f"{transfer.name} is read by {', '.join(others)} before it is waited for"


def _is_transfer(value: object) -> bool:
    """Whether a value is in flight: what a collective gives, or an item of it."""
    source = value.args[0] if isinstance(value, fx.Node) and value.target is operator.getitem else value
    return isinstance(source, fx.Node) and collective_of(source) is not None


def _check_values(program: Program, fake_mode: FakeTensorMode) -> None:
    """Propagate fake values anew and compare them with those stated."""
    known: dict[fx.Node, Any] = {}
    with fake_mode, torch.no_grad():
        for node in program.graph.nodes:
            if node.op == "placeholder":
                known[node] = node.meta["val"]
            elif node.op == "call_function":
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: known[n])
                try:
                    known[node] = node.target(*args, **kwargs)
                except Exception as error:
                    raise VerificationError(f"{node.name} cannot run: {error}\n{surroundings(node)}") from error
                _compare(node, node.meta.get("val"), known[node])


def _compare(node: fx.Node, stated: Any, found: Any) -> None:
    if isinstance(found, (list, tuple)):
        if not isinstance(stated, (list, tuple)) or len(stated) != len(found):
            raise VerificationError(
                f"{node.name} is stated to be {described(stated)} but is {described(found)}\n{surroundings(node)}"
            )
        for one, other in zip(stated, found, strict=True):
            _compare(node, one, other)
    elif isinstance(found, torch.Tensor):
        right = isinstance(stated, torch.Tensor) and stated.dtype == found.dtype and stated.device == found.device
        if not right or list(map(str, stated.shape)) != list(map(str, found.shape)):
            shown = [f"{t.dtype} {tuple(t.shape)}" if isinstance(t, torch.Tensor) else str(t) for t in (stated, found)]
            raise VerificationError(f"{node.name} is stated to be {shown[0]} but is {shown[1]}\n{surroundings(node)}")
