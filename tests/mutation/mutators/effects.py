"""Randomness and writing in place, broken."""

import itertools
import operator

from torch import fx

from graphopt.ir import (
    Effect,
    Phase,
    Program,
    annotate,
    effect_of,
    facts_of,
)
from tests.mutation.mutators.finding import aten, calls, find_arithmetic, first_call


def _random(program: Program) -> list[fx.Node]:
    return [node for node in calls(program) if effect_of(node) is Effect.RANDOM]


def recompute_a_random_operation(program: Program) -> bool:
    """Backward draws a mask of its own."""
    for node in _random(program):
        for item in list(node.users):
            users = [user for user in item.users if facts_of(user).phase is Phase.BACKWARD]
            if not users:
                continue
            with program.graph.inserting_before(min(users)):
                again = annotate(program.graph.node_copy(node), phase=Phase.BACKWARD)
                mask = program.graph.call_function(operator.getitem, (again, item.args[1]))
            mask.meta = dict(item.meta)
            annotate(mask, phase=Phase.BACKWARD)
            for user in users:
                user.replace_input_with(item, mask)
            return True
    return False


def draw_once_more(program: Program) -> bool:
    for node in _random(program):
        with program.graph.inserting_after(node):
            program.graph.node_copy(node)
        return True
    return False


def swap_draws(program: Program) -> bool:
    nodes = _random(program)
    for one, other in itertools.pairwise(nodes):
        same = isinstance(one.meta["val"], tuple) and one.meta["val"][0].shape == other.meta["val"][0].shape
        if same and one.args[1:] == other.args[1:]:
            first, second = list(one.users), list(other.users)
            for user in first:
                if other < user:
                    user.replace_input_with(one, other)
            for user in second:
                user.replace_input_with(other, one)
            return bool(second)
    return False


def write_in_place(program: Program) -> bool:
    node = first_call(program, aten.mul.Tensor)
    if node is None:
        return False
    node.target = aten.mul_.Tensor
    return True


def repeat_an_operation_in_place(program: Program) -> bool:
    """The published fault: a recompute divides a saved dropout mask a second time."""
    node = find_arithmetic(program)
    if node is None:
        return False
    with program.graph.inserting_after(node):
        program.graph.call_function(aten.div_.Tensor, (node, 0.5)).meta = dict(node.meta)
    return True
