"""Step graph -> a forward half and a backward half, where the user calls backward himself."""

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
        return Halves(_part(step, step.compute_nodes(Phase.FORWARD), kept, None), None)
    saved = _saved(backward_nodes, [node for _, node in gradients])
    saved_outputs = [(Output(OutputKind.SAVED, node.name), node) for node in saved]
    forward = _part(step, step.compute_nodes(Phase.FORWARD), [*kept, *saved_outputs], None)
    return Halves(forward, _part(step, backward_nodes, gradients, saved))


def _saved(backward_nodes: list[fx.Node], gradients: list[fx.Node | None]) -> list[fx.Node]:
    """Forward values that backward reads, in the order in which they are made."""
    read = [source for node in backward_nodes for source in node.all_input_nodes]
    read += [node for node in gradients if node is not None]
    return sorted({n for n in read if n.op == "call_function" and facts_of(n).phase is Phase.FORWARD})


def _part(
    step: Program, nodes: list[fx.Node], results: list[tuple[Output, fx.Node | None]], saved: list[fx.Node] | None
) -> Program:
    """A program of `nodes` alone; what they read of the rest is its input. `saved` is given for the backward half."""
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

    pairs = list(zip(step.inputs, step.placeholders, strict=True))
    for role, node in pairs:
        if role.kind is not InputKind.TANGENT and node in needed:
            add(role, node)
    for node in saved or ():
        add(Input(InputKind.SAVED, node.name), node)
    for role, node in pairs:
        if role.kind is InputKind.TANGENT and saved is not None:
            add(role, node)
    for node in nodes:
        missing = [source.name for source in node.all_input_nodes if source not in copies]
        if missing:
            raise PassError(
                f"{node.name} is a {facts_of(node).phase.value} node but reads {', '.join(missing)}, computed later"
            )
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] if node is not None else None for _, node in results))
    module = fx.GraphModule(step.module, graph)
    return Program(module, inputs, [role for role, _ in results], Level.STEP, step.aliases, step.constants)
