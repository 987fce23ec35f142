"""canonicalize: one spelling for what capture may spell in several ways."""

import torch
from torch import fx

from graphopt.ir import Level, Program
from graphopt.passes.base import Pass, PassContext
from graphopt.passes.rewrite import remove_dead, remove_identities

aten = torch.ops.aten

_ASSERTIONS = (
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten.sym_constrain_range_for_size.default,
)


class Canonicalize(Pass):
    """Drop assertions that capture has proved, views that change nothing and nodes nobody reads.

    Copies are spelled as casts, views as reshapes.
    """

    name = "canonicalize"
    level = Level.FORWARD
    produces = Level.FORWARD
    keeps_values = True

    def run(self, program: Program, context: PassContext) -> bool:
        graph = program.graph
        asserted = [node for node in graph.nodes if node.op == "call_function" and node.target in _ASSERTIONS]
        for node in asserted:
            graph.erase_node(node)
        copies = graph.find_nodes(op="call_function", target=aten.copy.default)
        for node in copies:
            _copy_as_cast(graph, node)
        views = graph.find_nodes(op="call_function", target=aten.view.default)
        for node in views:
            # Under autograd attention may lay its result out otherwise than it did in capture.
            node.target = aten.reshape.default
        identities = remove_identities(program)
        dead = remove_dead(program)
        context.statistics.update(
            assertions=len(asserted), copies=len(copies), views=len(views), identities=identities, dead=dead
        )
        return bool(asserted or copies or views or identities or dead)


def _copy_as_cast(graph: fx.Graph, node: fx.Node) -> None:
    """``copy(into, value)`` is `value` in the dtype and shape of `into`; spelled so, it has a derivative."""
    into, value = node.args[0], node.args[1]
    assert isinstance(into, fx.Node) and isinstance(value, fx.Node)
    wanted, given = into.meta["val"], value.meta["val"]
    with graph.inserting_before(node):
        result = value
        # Spread first: eager casts the gradient before it sums it.
        if tuple(given.shape) != tuple(wanted.shape):
            result = graph.call_function(aten.expand_as.default, (result, into))
            result.meta = {**node.meta, "val": given.expand_as(wanted)}
        if given.dtype != wanted.dtype:
            result = graph.call_function(aten._to_copy.default, (result,), {"dtype": wanted.dtype})
            result.meta = dict(node.meta)
    node.replace_all_uses_with(result)
    graph.erase_node(node)
