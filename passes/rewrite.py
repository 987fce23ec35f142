"""Small rewrites that several passes share."""

import operator

import torch
from torch import fx

from graphopt.ir import Effect, Program, effect_of, is_view


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
    """Bypass views that look exactly like what they are taken of."""
    removed = 0
    for node in list(program.graph.nodes):
        if node.op == "call_function" and node.target is not operator.getitem and is_view(node):
            source = node.args[0]
            if isinstance(source, fx.Node) and _looks_the_same(source.meta.get("val"), node.meta.get("val")):
                node.replace_all_uses_with(source)
                program.graph.erase_node(node)
                removed += 1
    return removed


def _looks_the_same(before: object, after: object) -> bool:
    if not (isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor)):
        return False
    if before.dtype != after.dtype or before.dim() != after.dim():
        return False
    pairs = zip((*before.shape, *before.stride()), (*after.shape, *after.stride()), strict=True)
    return all(_same_size(a, b) for a, b in pairs)


def _same_size(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    """Equal without adding a guard: symbols are compared as expressions."""
    return a == b if isinstance(a, int) and isinstance(b, int) else str(a) == str(b)
