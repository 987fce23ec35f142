"""Which storage each value lives in, and from when to when."""

import operator
from collections import Counter
from dataclasses import dataclass

import torch
from torch import fx

from graphopt.ir.collectives import WAIT
from graphopt.ir.copies import COPY_WAITS
from graphopt.ir.effects import is_view
from graphopt.ir.program import Program
from graphopt.ir.values import byte_size, is_contiguous

# Shares storage with its argument, though its schema does not say so.
_UNSAFE_VIEW = torch.ops.aten._unsafe_view.default


def storage_of(program: Program) -> dict[fx.Node, fx.Node]:
    """For each node, the node that allocated the storage its value lies in: a view's is that of what it views.

    The items of a list are storages of their own, unless the list is one of views (split, unbind); waiting for a
    collective, or for a copy, gives the storage of what is waited for.
    """
    owner: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        if source is None or node.op != "call_function":
            owner[node] = node
        elif node.target is operator.getitem:
            is_own = isinstance(source.meta.get("val"), (list, tuple)) and owner[source] is source
            owner[node] = node if is_own else owner[source]
        else:
            owner[node] = owner[source] if shares_storage(node) else node
    return owner


@dataclass(frozen=True)
class Interval:
    """A storage from the node that allocates it to the last that reads it; None: it outlives the program."""

    owner: fx.Node
    first: int
    last: int | None


def intervals(program: Program) -> list[Interval]:
    """The life of every storage that a call allocates, counted in positions of the graph, in order of allocation."""
    owner = storage_of(program)
    position = {node: index for index, node in enumerate(program.graph.nodes)}
    last: dict[fx.Node, int] = {}
    kept = {owner[node] for node in program.results if node is not None}
    for node in program.graph.nodes:
        last[owner[node]] = max(last.get(owner[node], 0), position[node])
        if node.op != "output":
            for source in node.all_input_nodes:
                last[owner[source]] = max(last[owner[source]], position[node])
    return [
        Interval(node, position[_allocator(node)], None if node in kept else last[node])
        for node in program.graph.nodes
        if node.op == "call_function" and owner[node] is node and isinstance(node.meta.get("val"), torch.Tensor)
    ]


def own_results(program: Program) -> set[fx.Node]:
    """Results that nothing else lies in the storage of, so that who gets one may write to it."""
    owner = storage_of(program)
    results = [node for node in program.results if node is not None]
    lying = Counter(owner[node] for node in results)
    return {
        node
        for node in results
        if lying[owner[node]] == 1
        and owner[node].op == "call_function"
        and byte_size(node.meta["val"]) == byte_size(owner[node].meta["val"])
    }


def _allocator(node: fx.Node) -> fx.Node:
    """The call that allocates a storage: for an item of a list of results, the call that gives the list."""
    source = node.args[0] if node.args else None
    return source if node.target is operator.getitem and isinstance(source, fx.Node) else node


def shares_storage(node: fx.Node) -> bool:
    """Whether a call's result lies in the storage of its first argument."""
    if node.target in (torch.ops.aten.reshape.default, torch.ops.aten.contiguous.default):
        return is_contiguous(node.all_input_nodes[0].meta["val"])  # they copy when they must
    return node.target in (WAIT, _UNSAFE_VIEW) or node.target in COPY_WAITS or is_view(node)
