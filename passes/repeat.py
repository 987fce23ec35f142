"""Computing forward values again in backward, so that nothing of them is saved."""

from collections.abc import Collection, Iterable

from torch import fx

from graphopt.cost.repetition import repetitions
from graphopt.ir import Effect, Phase, Program, annotate, effect_of, explain
from graphopt.passes.build import Builder
from graphopt.passes.rewrite import remove_dead


def made_of(program: Program, weights: Iterable[fx.Node]) -> set[fx.Node]:
    """What forward makes of `weights` alone: a transpose, a cast."""
    weights = set(weights)
    derived = set(weights)
    for node in program.compute_nodes(Phase.FORWARD):
        inputs = node.all_input_nodes
        if inputs and effect_of(node) is Effect.PURE and derived.issuperset(inputs):
            derived.add(node)
    return derived - weights


def repeat_in_backward(builder: Builder, nodes: Collection[fx.Node], reason: str) -> int:
    """Have backward compute forward `nodes` again, each just before it is first needed; returns how many it computes.

    nodes: pure calls. What they read and is not among them is saved, if it is not an input of the program. reason: why,
    for the reader.
    """
    copies: dict[fx.Node, fx.Node] = {}
    readers = builder.program.compute_nodes(Phase.BACKWARD)
    for reader, needed in repetitions(readers, lambda node: node.all_input_nodes, set(nodes)):
        for node in needed:
            with builder.before(reader):
                copy = builder.graph.node_copy(node, lambda source: copies.get(source, source))
            annotate(copy, like=node, phase=Phase.BACKWARD, origin=node.name, made_by=builder.made_by)
            explain(copy, builder.made_by, reason)
            copies[node] = copy
        for source in reader.all_input_nodes:
            if source in copies:
                reader.replace_input_with(source, copies[source])
    if copies:
        remove_dead(builder.program)
    return len(copies)
