"""How the value of each node lies over the ranks, in words: read from roles, collectives and moves, and handed on."""

from collections.abc import Iterator, Mapping

from torch import fx

from graphopt.ir import InputKind, OutputKind, ParameterLayout, Program, moves
from graphopt.ir.collectives import collective_of

REPLICATED = "replicated"
OWN_BATCH = "of own batch"

_Lying = dict[str, str]  # axis -> how; nothing of an axis whose ranks have the same

_WHOLE = {moves.LEAVE, moves.GATHER, moves.MAXIMUM}
_PARTS = {moves.PART, moves.OWN_PART, moves.SCATTER_SUM, moves.ALL_TO_ALL}
_SUMMANDS = {moves.FIRST, moves.ON_FIRST, moves.PLACED}
_SUMS = {moves.LEAVE, moves.SCATTER_SUM}


def placements(program: Program, layouts: Mapping[str, ParameterLayout]) -> dict[fx.Node, str]:
    """For each node ``replicated``, or how it lies over each axis, as in ``of own batch, part 0 of tp``.

    ``partial over tp`` is a summand; ``shard 0 of dp`` a shard; ``of own part over tp`` what comes of parts. Nothing
    for one rank. layouts: parameter name -> how it lies over the ranks.
    """
    data_axis = next((layout.axis for layout in layouts.values() if layout.ranks > 1), None)
    found: dict[fx.Node, _Lying] = {}
    for role, node in program.nodes_of(*InputKind):
        found[node] = _of_input(role.kind, layouts.get(role.name), data_axis)
    for node in program.graph.nodes:
        if node.op not in ("placeholder", "output"):
            found[node] = _of_call(node, found, data_axis)
    for node, axis in _summands(program, data_axis):
        found[node][axis] = f"partial over {axis}"
    if data_axis is None and not any(found.values()):
        return dict.fromkeys(program.graph.nodes, "")
    axes = sorted({axis for lying in found.values() for axis in lying}, key=lambda axis: (axis != data_axis, axis))
    return {
        node: ", ".join(lying[axis] for axis in axes if axis in lying) or REPLICATED for node, lying in found.items()
    }


def _of_input(kind: InputKind, layout: ParameterLayout | None, data_axis: str | None) -> _Lying:
    if kind in (InputKind.BATCH, InputKind.TANGENT, InputKind.RECEIVED):
        return {data_axis: OWN_BATCH} if data_axis is not None else {}
    if layout is None:
        return {}
    lying = {split.axis: f"part {split.dim} of {split.axis}" for split in layout.splits}
    return lying | ({layout.axis: f"shard {layout.dim} of {layout.axis}"} if kind is InputKind.SHARD else {})


def _of_call(node: fx.Node, found: Mapping[fx.Node, _Lying], data_axis: str | None) -> _Lying:
    """What its arguments are; a collective or a move decides for its axis."""
    lying: _Lying = {}
    for source in node.all_input_nodes:
        for axis, how in found[source].items():
            handed_on = how if axis == data_axis else f"of own part over {axis}"
            if axis not in lying or handed_on == OWN_BATCH:
                lying[axis] = handed_on
    collective = collective_of(node)
    if collective is not None and collective.kind == "reduce-scatter" and collective.axis == data_axis:
        lying[data_axis] = f"shard 0 of {data_axis}"
    elif collective is not None and collective.kind in ("all-gather", "all-reduce"):
        lying.pop(collective.axis, None)
    elif node.target in _WHOLE:
        lying.pop(_axis_of(node), None)
    elif node.target in _PARTS:
        lying[_axis_of(node)] = f"part {node.args[1]} of {_axis_of(node)}"
    elif node.target in _SUMMANDS:
        lying[_axis_of(node)] = f"partial over {_axis_of(node)}"
    return lying


def _summands(program: Program, data_axis: str | None) -> Iterator[tuple[fx.Node, str]]:
    """What is summed over an axis; and gradients of parameters that are not means yet."""
    for node in program.compute_nodes():
        collective = collective_of(node)
        if collective is not None and collective.reduction not in (None, "max"):
            yield from ((source, collective.axis) for source in node.all_input_nodes if source.op == "call_function")
        elif node.target in _SUMS:
            yield node.all_input_nodes[0], _axis_of(node)
    if not program.reduced and data_axis is not None:
        yield from ((node, data_axis) for _, node in program.results_of(OutputKind.GRADIENT) if node is not None)


def _axis_of(move: fx.Node) -> str:
    """The mesh axis over which a value moves: the one text among the arguments."""
    return next(argument for argument in move.args if isinstance(argument, str))
