"""What mutators look for in a program."""

from collections.abc import Iterator

import torch
from torch import fx

from graphopt.ir import (
    Program,
)

aten = torch.ops.aten
functional = torch.ops._c10d_functional
WAIT = functional.wait_tensor.default
GATHER = functional.all_gather_into_tensor_coalesced.default
SCATTER = functional.reduce_scatter_tensor_coalesced.default
REDUCE = functional.all_reduce_coalesced.default


def calls(program: Program, *targets: object) -> Iterator[fx.Node]:
    return (node for node in program.compute_nodes() if not targets or node.target in targets)


def first_call(program: Program, *targets: object) -> fx.Node | None:
    return next(calls(program, *targets), None)


def same_value(one: fx.Node, other: fx.Node) -> bool:
    a, b = one.meta.get("val"), other.meta.get("val")
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return False
    return a.shape == b.shape and a.dtype == b.dtype and a.stride() == b.stride()


def alike_pairs(nodes: list[fx.Node]) -> Iterator[tuple[fx.Node, fx.Node]]:
    return ((a, b) for i, a in enumerate(nodes) for b in nodes[i + 1 :] if same_value(a, b))


def find_mean(program: Program) -> fx.Node | None:
    """The division that makes a sum over ranks their mean."""
    waits = calls(program, WAIT)
    return next((u for w in waits for u in w.users if u.target is aten.div.Tensor and isinstance(u.args[1], int)), None)


def bypass(node: fx.Node, source: fx.Node) -> bool:
    node.replace_all_uses_with(source)
    node.graph.erase_node(node)
    return True


def find_arithmetic(program: Program) -> fx.Node | None:
    """A product of two values of one type, which is not its own mirror image."""
    for node in calls(program, aten.mul.Tensor, aten.add.Tensor):
        if len(node.all_input_nodes) == 2 and all(same_value(node, s) for s in node.all_input_nodes):
            return node
    return None
