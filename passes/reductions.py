"""Reductions of gradients: sums over ranks of which nothing but a gradient is made, one behind the other by axis.

They are written alike, whoever put them in: a coalesced collective of one gradient, its item, and a wait for that.
"""

import operator
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import fx

from graphopt.ir import Phase
from graphopt.ir.collectives import WAIT, launch_of, sources_of
from graphopt.ir.roles import GRADIENTS
from graphopt.passes.build import Builder

collective = torch.ops._c10d_functional

REDUCTIONS = (collective.reduce_scatter_tensor_coalesced.default, collective.all_reduce_coalesced.default)


def list_sums(builder: Builder) -> int:
    """Write the sums that a gradient is made of in the common way. Returns how many there were in another."""
    count = 0
    for _, node in builder.program.results_of(*GRADIENTS):
        while node is not None and _is_link(node):
            (source,) = node.all_input_nodes
            if node.target is WAIT and source.target is collective.all_reduce.default:
                source = _listed(builder, source, node)
                count += 1
            node = source
    return count


def _is_link(node: fx.Node) -> bool:
    """Whether a call makes one thing of one other, for one reader."""
    return node.op == "call_function" and len(node.users) == len(node.all_input_nodes) == 1


def _listed(builder: Builder, launched: fx.Node, wait: fx.Node) -> fx.Node:
    """Put a coalesced sum in the place of one; returns what is summed."""
    (source,) = sources_of(launched)
    with builder.before(launched):
        target = collective.all_reduce_coalesced.default
        coalesced = builder.call(target, [source], *launched.args[1:], like=launched, phase=Phase.BACKWARD)
        item = builder.call(operator.getitem, coalesced, 0, like=launched, phase=Phase.BACKWARD)
    wait.replace_input_with(launched, item)
    builder.graph.erase_node(launched)
    return source


def reduced_before(reduction: fx.Node) -> fx.Node | None:
    """The reduction of whose result alone this one's first argument is made; None if there is none."""
    node = sources_of(reduction)[0]
    while node.op == "call_function" and len(node.all_input_nodes) == 1:
        (source,) = node.all_input_nodes
        launch = launch_of(source) if node.target is WAIT else None
        if launch is not None and launch[0].node.target in REDUCTIONS:
            return launch[0].node
        node = source  # of a gather, too: what ranks hold in parts may be joined before it is summed further
    return None


def by_level(nodes: Iterable[fx.Node]) -> list[list[fx.Node]]:
    """The reductions among nodes, in order: of what a rank computed itself, then of what those give, and so on."""
    level: dict[fx.Node, int] = {}
    found: defaultdict[int, list[fx.Node]] = defaultdict(list)
    for node in nodes:
        if node.target in REDUCTIONS:
            before = reduced_before(node)
            level[node] = 0 if before is None else level[before] + 1
            found[level[node]].append(node)
    return [found[number] for number in sorted(found)]
