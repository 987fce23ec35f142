"""How the value of each node lies over the ranks, in words: read from roles and collectives, and handed on to users."""

from collections.abc import Mapping

from torch import fx

from graphopt.ir import InputKind, OutputKind, ParameterLayout, Program
from graphopt.ir.collectives import collective_of

REPLICATED = "replicated"
OWN_BATCH = "of own batch"


def placements(program: Program, layouts: Mapping[str, ParameterLayout]) -> dict[fx.Node, str]:
    """For each node: ``replicated``, ``of own batch``, ``partial over dp``, ``shard 0 of dp``; nothing for one rank.

    layouts: parameter name -> how it lies over the ranks.
    """
    axis = next((layout.axis for layout in layouts.values() if layout.ranks > 1), None)
    if axis is None:
        return dict.fromkeys(program.graph.nodes, "")
    found = {node: _of_input(role.kind, layouts.get(role.name)) for role, node in program.nodes_of(*InputKind)}
    for node in program.graph.nodes:
        if node.op not in ("placeholder", "output"):
            found[node] = _of_call(node, found)
    for node in _to_be_reduced(program):
        found[node] = f"partial over {axis}"
    return found


def _of_input(kind: InputKind, layout: ParameterLayout | None) -> str:
    if kind in (InputKind.BATCH, InputKind.TANGENT):
        return OWN_BATCH
    return f"shard {layout.dim} of {layout.axis}" if kind is InputKind.SHARD and layout is not None else REPLICATED


def _of_call(node: fx.Node, found: Mapping[fx.Node, str]) -> str:
    """A collective decides; anything else is what its arguments are, and replicated only if all of them are."""
    collective = collective_of(node)
    if collective is not None and collective.kind != "all-to-all":
        return f"shard 0 of {collective.axis}" if collective.kind == "reduce-scatter" else REPLICATED
    given = {found[source] for source in node.all_input_nodes}
    if OWN_BATCH in given:
        return OWN_BATCH
    return next(iter(sorted(given - {REPLICATED})), REPLICATED)


def _to_be_reduced(program: Program) -> set[fx.Node]:
    """Gradients of parameters that are not means yet: each rank has a part of the sum."""
    if program.reduced:
        sources = {
            source
            for node in program.compute_nodes()
            if (launched := collective_of(node)) is not None and launched.kind != "all-gather"
            for source in node.all_input_nodes
        }
        return {node for node in sources if node.op == "call_function"}
    return {node for _, node in program.results_of(OutputKind.GRADIENT) if node is not None}
