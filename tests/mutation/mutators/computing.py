"""Broken arithmetic."""

import torch

from graphopt.ir import (
    Effect,
    InputKind,
    OutputKind,
    Phase,
    Program,
    effect_of,
    facts_of,
)
from tests.mutation.mutators.finding import alike_pairs, aten, bypass, calls, find_arithmetic, first_call, same_value


def state_another_dtype(program: Program) -> bool:
    node = find_arithmetic(program)
    if node is None:
        return False
    node.meta["val"] = node.meta["val"].double()
    return True


def round_to_half(program: Program) -> bool:
    """Types stay as they were."""
    node = find_arithmetic(program)
    if node is None or node.meta["val"].dtype is not torch.float32:
        return False
    with program.graph.inserting_after(node):
        narrow = program.graph.call_function(aten._to_copy.default, (node,), {"dtype": torch.bfloat16})
        narrow.meta = {**node.meta, "val": node.meta["val"].to(torch.bfloat16)}
    with program.graph.inserting_after(narrow):
        wide = program.graph.call_function(aten._to_copy.default, (narrow,), {"dtype": torch.float32})
        wide.meta = dict(node.meta)
    node.replace_all_uses_with(wide, delete_user_cb=lambda user: user is not narrow)
    return True


def compute_another_operation(program: Program) -> bool:
    node = find_arithmetic(program)
    if node is None:
        return False
    node.target = aten.sub.Tensor
    return True


def compute_another_shape(program: Program) -> bool:
    node = first_call(
        program, aten.tanh.default, aten.neg.default, aten.relu.default, aten.rsqrt.default, aten.silu.default
    )
    if node is None:
        return False
    node.target = aten.sum.default
    return True


def swap_operands(program: Program) -> bool:
    for node in calls(program, aten.sub.Tensor, aten.div.Tensor, aten.mm.default, aten.bmm.default):
        sources = node.all_input_nodes
        if len(sources) == 2 and sources[0].meta["val"].shape == sources[1].meta["val"].shape:
            node.args = (node.args[1], node.args[0], *node.args[2:])
            return True
    return False


def change_a_constant(program: Program) -> bool:
    for node in calls(program):
        for index, argument in enumerate(node.args):
            if isinstance(argument, float):
                node.update_arg(index, argument * 2 + 1)
                return True
    return False


def reduce_along_another_dimension(program: Program) -> bool:
    for node in calls(program, aten._softmax.default, aten._log_softmax.default):
        dims = node.meta["val"].dim()
        node.args = (node.args[0], (int(str(node.args[1])) % dims) - 1, *node.args[2:])
        return True
    return False


def flip_a_flag(program: Program) -> bool:
    for node in calls(program):
        for index, argument in enumerate(node.args):
            if isinstance(argument, bool) and effect_of(node) is Effect.PURE:
                node.update_arg(index, not argument)
                return True
    return False


def read_another_value(program: Program) -> bool:
    node = find_arithmetic(program)
    if node is None:
        return False
    one, other = node.all_input_nodes
    node.args = (one, one, *node.args[2:]) if one is not other else node.args
    return one is not other


def skip_an_operation(program: Program) -> bool:
    node = find_arithmetic(program)
    return node is not None and bypass(node, node.all_input_nodes[0])


def read_a_saved_value_of_another_layer(program: Program) -> bool:
    forward = [n for n in program.compute_nodes(Phase.FORWARD) if facts_of(n).layer]
    for one, other in alike_pairs(forward):
        if facts_of(one).layer == facts_of(other).layer or one.target is not other.target:
            continue
        users = [user for user in other.users if facts_of(user).phase is Phase.BACKWARD]
        if users and effect_of(one) is Effect.PURE:
            users[0].replace_input_with(other, one)
            return True
    return False


def keep_a_stale_buffer(program: Program) -> bool:
    buffers = {role.name: node for role, node in program.nodes_of(InputKind.BUFFER)}
    results = list(program.results)
    for index, role in enumerate(program.outputs):
        if role.kind is OutputKind.BUFFER and results[index] is not buffers.get(role.name):
            results[index] = buffers[role.name]
            program.set_results(results, program.outputs)
            return True
    return False


def read_a_tangent_in_forward(program: Program) -> bool:
    tangent = next((node for _, node in program.nodes_of(InputKind.TANGENT)), None)
    for node in program.compute_nodes(Phase.FORWARD):
        source = next((s for s in node.all_input_nodes if tangent is not None and same_value(s, tangent)), None)
        if source is not None and tangent is not None:
            node.replace_input_with(source, tangent)
            return True
    return False
