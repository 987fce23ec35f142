"""Broken order, inputs and outputs."""

from torch import fx

from graphopt.ir import (
    Input,
    InputKind,
    Output,
    OutputKind,
    Phase,
    Program,
    annotate,
)
from tests.mutation.mutators.finding import alike_pairs, calls


def use_before_definition(program: Program) -> bool:
    node = next(n for n in calls(program) if n.users)
    program.output_node.prepend(node)
    return True


def move_a_forward_node_to_backward(program: Program) -> bool:
    node = next((n for n in program.compute_nodes(Phase.FORWARD) if n.users), None)
    if node is None:
        return False
    annotate(node, phase=Phase.BACKWARD)
    return True


def return_a_backward_value(program: Program) -> bool:
    backward = program.compute_nodes(Phase.BACKWARD)
    results = list(program.results)
    for index, role in enumerate(program.outputs):
        if role.kind is OutputKind.USER and backward:
            results[index] = backward[-1]
            program.set_results(results, program.outputs)
            return True
    return False


def lose_a_role(program: Program) -> bool:
    program.inputs.pop()
    return True


def give_a_role_twice(program: Program) -> bool:
    program.inputs[1] = program.inputs[0]
    return True


def swap_roles_of_inputs(program: Program) -> bool:
    nodes = program.placeholders
    for one, other in alike_pairs(nodes):
        i, j = nodes.index(one), nodes.index(other)
        if one.users and other.users:
            program.inputs[i], program.inputs[j] = program.inputs[j], program.inputs[i]
            return True
    return False


def name_a_gradient_after_another(program: Program) -> bool:
    indices = [i for i, role in enumerate(program.outputs) if role.kind is OutputKind.GRADIENT]
    if len(indices) < 2:
        return False
    i, j = indices[:2]
    program.outputs[i], program.outputs[j] = program.outputs[j], program.outputs[i]
    return program.results[i] is not None or program.results[j] is not None


def lose_a_result(program: Program) -> bool:
    results = list(program.results)
    results[0] = None
    program.set_results(results, program.outputs)
    return program.outputs[0].kind is not OutputKind.GRADIENT


def add_a_result_without_meaning(program: Program) -> bool:
    program.set_results(
        [*program.results, program.placeholders[0]], [*program.outputs, Output(OutputKind.SAVED, "extra")]
    )
    return True


def hold_a_shard_of_another_shape(program: Program) -> bool:
    for _, node in program.nodes_of(InputKind.SHARD):
        value = node.meta["val"]
        if not node.users:
            with value.fake_mode:
                node.meta["val"] = value.new_empty((value.shape[0] + 1, *value.shape[1:]))
            return True
    for index, role in enumerate(program.inputs):
        if role.kind is InputKind.SHARD:
            program.inputs[index] = Input(InputKind.PARAMETER, role.name, role.requires_grad)
            return True
    return False


def lose_a_constant(program: Program) -> bool:
    if not program.constants:
        return False
    program.constants.pop(next(iter(program.constants)))
    return True


def read_a_node_of_another_graph(program: Program) -> bool:
    node = next(n for n in calls(program) if n.all_input_nodes)
    stranger = fx.Graph().placeholder("stranger")
    stranger.meta = dict(node.all_input_nodes[0].meta)
    node.replace_input_with(node.all_input_nodes[0], stranger)
    return True
