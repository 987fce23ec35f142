"""Broken launches and waits."""

import torch

from graphopt.ir import (
    Program,
)
from tests.mutation.mutators.finding import GATHER, REDUCE, SCATTER, WAIT, alike_pairs, aten, bypass, calls, first_call


def drop_a_wait(program: Program) -> bool:
    wait = first_call(program, WAIT)
    return wait is not None and bypass(wait, wait.all_input_nodes[0])


def wait_twice(program: Program) -> bool:
    wait = first_call(program, WAIT)
    if wait is None:
        return False
    with program.graph.inserting_after(wait):
        program.graph.node_copy(wait)
    return True


def read_in_flight(program: Program) -> bool:
    wait = first_call(program, WAIT)
    if wait is None:
        return False
    item = wait.all_input_nodes[0]
    with program.graph.inserting_after(item):
        program.graph.call_function(aten.neg.default, (item,)).meta = dict(item.meta)
    return True


def wait_for_a_value(program: Program) -> bool:
    node = next((n for n in calls(program) if isinstance(n.meta["val"], torch.Tensor) and n.target is not WAIT), None)
    if node is None or first_call(program, WAIT) is None:
        return False
    with program.graph.inserting_after(node):
        waited = program.graph.call_function(WAIT, (node,))
    waited.meta = dict(node.meta)
    return True


def take_an_item_twice(program: Program) -> bool:
    for gather in calls(program, GATHER, SCATTER):
        items = list(gather.users)
        for one, other in alike_pairs(items):
            one.args = other.args
            return True
    return False


def swap_items(program: Program) -> bool:
    for gather in calls(program, GATHER):
        for one, other in alike_pairs(list(gather.users)):
            one.args, other.args = other.args, one.args
            return True
    return False


def forget_an_item(program: Program) -> bool:
    for gather in calls(program, GATHER):
        item = next(iter(gather.users))
        wait = next(iter(item.users))
        shape, dtype = list(wait.meta["val"].shape), wait.meta["val"].dtype
        with program.graph.inserting_after(wait):
            zeros = program.graph.call_function(aten.zeros.default, (shape,), {"dtype": dtype})
        zeros.meta = dict(wait.meta)
        wait.replace_all_uses_with(zeros)
        program.graph.erase_node(wait)
        program.graph.erase_node(item)
        return True
    return False


def launch_twice(program: Program) -> bool:
    gather = first_call(program, GATHER)
    if gather is None:
        return False
    with program.graph.inserting_after(gather):
        program.graph.node_copy(gather)
    return True


def launch_after_the_wait(program: Program) -> bool:
    gather = first_call(program, GATHER, SCATTER, REDUCE)
    if gather is None:
        return False
    wait = next(iter(next(iter(gather.users)).users))
    wait.append(gather)
    return True
