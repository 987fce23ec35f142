"""Small rewrites that several passes share."""

import operator

from torch import fx

from graphopt.ir import Effect, Level, Program, effect_of, is_view
from graphopt.ir.effects import stops_gradient
from graphopt.ir.values import is_alike


def remove_dead(program: Program) -> int:
    """Erase pure nodes that nothing reads; random nodes stay, so that the generator advances as in eager."""
    removed = 0
    for node in reversed(list(program.graph.nodes)):
        if node.op == "call_function" and not node.users and effect_of(node) is Effect.PURE:
            program.graph.erase_node(node)
            removed += 1
        elif node.op == "get_attr" and not node.users:
            program.graph.erase_node(node)
    return removed


def remove_identities(program: Program) -> int:
    """Bypass views that look exactly like what they are taken of; a detach counts until gradients are explicit."""
    removed = 0
    for node in list(program.graph.nodes):
        if program.level is Level.FORWARD and stops_gradient(node):
            continue
        if node.op == "call_function" and node.target is not operator.getitem and is_view(node):
            source = node.args[0]
            if isinstance(source, fx.Node) and is_alike(source.meta.get("val"), node.meta.get("val")):
                node.replace_all_uses_with(source)
                program.graph.erase_node(node)
                removed += 1
    return removed
