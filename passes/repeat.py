"""Computing forward values again in backward, so that nothing of them is saved."""

from collections.abc import Collection

from torch import fx

from graphopt.ir import Phase, annotate, explain
from graphopt.passes.build import Builder
from graphopt.passes.rewrite import remove_dead


def repeat_in_backward(builder: Builder, nodes: Collection[fx.Node], reason: str) -> int:
    """Have backward compute forward `nodes` again, each just before it is first needed; returns how many it computes.

    nodes: pure calls. What they read and is not among them is saved, if it is not an input of the program. reason: why,
    for the reader.
    """
    repeatable = set(nodes)
    position = {node: index for index, node in enumerate(builder.graph.nodes)}
    copies: dict[fx.Node, fx.Node] = {}
    for reader in builder.program.compute_nodes(Phase.BACKWARD):
        needed = _behind([s for s in reader.all_input_nodes if s in repeatable], repeatable, copies)
        for node in sorted(needed, key=position.__getitem__):
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


def _behind(nodes: list[fx.Node], repeatable: set[fx.Node], done: Collection[fx.Node]) -> set[fx.Node]:
    """`nodes` and all repeatable ones that they are computed from, without those that are done."""
    found: set[fx.Node] = set()
    todo = [node for node in nodes if node not in done]
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo += [s for s in node.all_input_nodes if s in repeatable and s not in done]
    return found
