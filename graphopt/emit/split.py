"""Step graph -> a forward half and a backward half, and that in two parts where a pipeline wants it so."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import fx

from graphopt.errors import PassError
from graphopt.ir import Input, InputKind, Level, Output, OutputKind, Phase, Program, facts_of
from graphopt.ir.roles import GRADIENTS


@dataclass
class Halves:
    """forward: new buffers, user outputs, what is sent, then the saved values. backward: None for inference.

    The backward half reads, in order: inputs of the step that it needs (their own roles), saved values, tangents.
    """

    forward: Program
    backward: Program | None


def split(step: Program) -> Halves:
    """Cut a step program at the line between its phases."""
    assert step.level is Level.STEP
    backward_nodes = step.compute_nodes(Phase.BACKWARD)
    gradients = list(step.results_of(*GRADIENTS))
    kept = [*step.results_of(OutputKind.BUFFER), *step.results_of(OutputKind.USER), *step.results_of(OutputKind.SENT)]
    if not gradients:
        return Halves(_part(step, step.compute_nodes(Phase.FORWARD), kept, _no_tangent), None)
    saved = _saved(backward_nodes, [node for _, node in gradients])
    saved_outputs = [(Output(OutputKind.SAVED, node.name), node) for node in saved]
    forward = _part(step, step.compute_nodes(Phase.FORWARD), [*kept, *saved_outputs], _no_tangent)
    return Halves(forward, _part(step, backward_nodes, gradients, _any_tangent, saved))


def _saved(backward_nodes: list[fx.Node], gradients: list[fx.Node | None]) -> list[fx.Node]:
    """Forward values that backward reads, in the order in which they are made."""
    read = [source for node in backward_nodes for source in node.all_input_nodes]
    read += [node for node in gradients if node is not None]
    return sorted({n for n in read if n.op == "call_function" and facts_of(n).phase is Phase.FORWARD})


def split_backward(backward: Program) -> tuple[Program, Program]:
    """Cut a backward half in two: gradients of what was received, for which the stage before waits, then all others.

    The second reads what the first has saved for it, beside what it needs of the half's own inputs (Qi et al. 2023).
    """
    first: set[fx.Node] = set()
    todo = [node for _, node in backward.results_of(OutputKind.RECEIVED_GRADIENT) if node is not None]
    while todo:
        node = todo.pop()
        if node.op == "call_function" and node not in first:
            first.add(node)
            todo += node.all_input_nodes
    returned = list(backward.results_of(OutputKind.RECEIVED_GRADIENT))
    others = [(role, node) for role, node in backward.results_of(*GRADIENTS) if (role, node) not in returned]
    calls = backward.compute_nodes()
    early, late = [n for n in calls if n in first], [n for n in calls if n not in first]
    read = {source for node in late for source in node.all_input_nodes} | {node for _, node in others}
    handed_on = [(Output(OutputKind.SAVED, node.name), node) for node in early if node in read]
    return (
        _part(backward, early, [*returned, *handed_on], _needed),
        _part(backward, late, others, _needed, [node for _, node in handed_on]),
    )


def _no_tangent(role: Input, is_read: bool) -> bool:
    return is_read and role.kind is not InputKind.TANGENT


def _any_tangent(role: Input, is_read: bool) -> bool:
    return is_read or role.kind is InputKind.TANGENT


def _needed(role: Input, is_read: bool) -> bool:
    return is_read


def _part(
    program: Program,
    nodes: list[fx.Node],
    results: list[tuple[Output, fx.Node | None]],
    is_input: Callable[[Input, bool], bool],
    saved: Sequence[fx.Node] = (),
) -> Program:
    """A program of `nodes` alone, which reads inputs, those that are chosen by role and whether they are read, and
    saved values; tangents last."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    inputs: list[Input] = []
    needed = {source for node in nodes for source in node.all_input_nodes} | {
        node for _, node in results if node is not None
    }

    def add(role: Input, node: fx.Node) -> None:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta = dict(node.meta)
        inputs.append(role)

    pairs = zip(program.inputs, program.placeholders, strict=True)
    wanted = [(role, node) for role, node in pairs if is_input(role, node in needed)]
    for role, node in wanted:
        if role.kind is not InputKind.TANGENT:
            add(role, node)
    for node in saved:
        add(Input(InputKind.SAVED, node.name), node)
    for role, node in wanted:
        if role.kind is InputKind.TANGENT:
            add(role, node)
    for node in nodes:
        missing = [source.name for source in node.all_input_nodes if source not in copies]
        if missing:
            raise PassError(
                f"{node.name} is a {facts_of(node).phase.value} node but reads {', '.join(missing)}, computed later"
            )
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] if node is not None else None for _, node in results))
    module = fx.GraphModule(program.module, graph)
    return Program(module, inputs, [role for role, _ in results], Level.STEP, program.aliases, program.constants)
