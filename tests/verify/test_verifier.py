"""The verifier accepts what the passes make and refuses what is broken on purpose."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx

from graphopt.errors import VerificationError
from graphopt.ir import Input, InputKind, Level, Output, OutputKind, Phase, Program, annotate
from graphopt.ir.collectives import collectives_of
from graphopt.ir.structural_hash import structural_hash
from graphopt.verify.verifier import verify
from tests.support.programs import lowered

aten = torch.ops.aten
WAIT = torch.ops._c10d_functional.wait_tensor.default


def _first(program: Program, target: object) -> fx.Node:
    return next(node for node in program.compute_nodes() if node.target is target)


def drop_a_wait(program: Program) -> None:
    wait = _first(program, WAIT)
    wait.replace_all_uses_with(wait.args[0])  # type: ignore[arg-type]
    program.graph.erase_node(wait)


def wait_twice(program: Program) -> None:
    wait = _first(program, WAIT)
    with program.graph.inserting_after(wait):
        program.graph.node_copy(wait)


def read_before_waiting(program: Program) -> None:
    item = _first(program, WAIT).args[0]
    assert isinstance(item, fx.Node)
    with program.graph.inserting_after(item):
        program.graph.call_function(aten.neg.default, (item,)).meta = dict(item.meta)


def change_a_dtype(program: Program) -> None:
    node = _first(program, aten.tanh.default)
    node.meta["val"] = node.meta["val"].double()


def change_a_shape(program: Program) -> None:
    node = _first(program, aten.tanh.default)
    node.target = aten.sum.default


def read_backward_in_forward(program: Program) -> None:
    for node in program.compute_nodes(Phase.BACKWARD):
        annotate(node, phase=Phase.FORWARD)
        if node.users:
            annotate(next(iter(node.all_input_nodes)), phase=Phase.BACKWARD)


def write_in_place(program: Program) -> None:
    node = _first(program, aten.tanh.default)
    node.target = aten.tanh_.default


def use_before_definition(program: Program) -> None:
    node = _first(program, aten.tanh.default)
    program.output_node.prepend(node)


def lose_a_role(program: Program) -> None:
    program.inputs.pop()


def give_a_role_twice(program: Program) -> None:
    program.inputs[1] = program.inputs[0]


def lose_an_output(program: Program) -> None:
    program.set_results([None, *program.results[1:]], program.outputs)


def wait_for_what_was_waited_for(program: Program) -> None:
    _put_behind(_first(program, WAIT), WAIT)


def wait_for_a_plain_value(program: Program) -> None:
    _put_behind(_first(program, aten.tanh.default), WAIT)


def read_a_list_of_transfers_whole(program: Program) -> None:
    launched = collectives_of(program)[0].node
    with program.graph.inserting_after(launched):
        program.graph.call_function(aten.cat.default, (launched,)).meta["val"] = torch.empty(1)


def state_a_list_for_a_tensor(program: Program) -> None:
    node = _first(program, aten.tanh.default)
    node.meta["val"] = [node.meta["val"]]


def state_a_tensor_for_a_list(program: Program) -> None:
    launched = collectives_of(program)[0].node
    launched.meta["val"] = launched.meta["val"][0]


def read_a_tangent_in_forward(program: Program) -> None:
    ((_, tangent),) = program.nodes_of(InputKind.TANGENT)
    _put_behind(_first(program, aten.tanh.default), aten.mul.Tensor, tangent)


def return_a_backward_value_from_forward(program: Program) -> None:
    late = next(n for n in program.compute_nodes(Phase.BACKWARD) if isinstance(n.meta["val"], torch.Tensor))
    index = [role.kind for role in program.outputs].index(OutputKind.USER)
    results = list(program.results)
    results[index] = late
    program.set_results(results, program.outputs)


def lose_a_constant(program: Program) -> None:
    program.inputs[-1] = Input(InputKind.CONSTANT, "gone")


def _put_behind(node: fx.Node, target: Any, *others: fx.Node) -> None:
    """Have every reader of `node` read ``target(node, *others)``, of the same shape."""
    with node.graph.inserting_after(node):
        made = node.graph.call_function(target, (node, *others))
    made.meta = dict(node.meta)
    node.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)


MUTATIONS: list[Callable[[Program], None]] = [
    drop_a_wait, wait_twice, read_before_waiting, change_a_dtype, change_a_shape, read_backward_in_forward,
    write_in_place, use_before_definition, lose_a_role, give_a_role_twice, lose_an_output, wait_for_what_was_waited_for,
    wait_for_a_plain_value, read_a_list_of_transfers_whole, state_a_list_for_a_tensor, state_a_tensor_for_a_list,
    read_a_tangent_in_forward, return_a_backward_value_from_forward, lose_a_constant,
]  # fmt: skip


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_lowered_programs_are_valid(stage: int) -> None:
    compilation, program = lowered(f"zero={stage},zero.whole_below=0")
    verify(program, compilation.captured.fake_mode, {"dp": 2})
    for half in (compilation.halves.forward, compilation.halves.backward):
        assert half is not None
        verify(half, compilation.captured.fake_mode, {"dp": 2})


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.__name__)
def test_broken_programs_are_refused(mutation: Callable[[Program], None]) -> None:
    compilation, program = lowered("zero=3,zero.whole_below=0")
    before = structural_hash(program)
    mutation(program)
    assert structural_hash(program) != before
    with pytest.raises(VerificationError):
        verify(program, compilation.captured.fake_mode, {"dp": 2})


def test_a_message_shows_ten_nodes_on_each_side() -> None:
    compilation, program = lowered("zero=3,zero.whole_below=0")
    nodes = list(program.graph.nodes)
    at = next(i for i, n in enumerate(nodes) if n.target is aten.tanh.default)
    change_a_dtype(program)
    with pytest.raises(VerificationError) as caught:
        verify(program, compilation.captured.fake_mode, {"dp": 2})
    _, *shown = str(caught.value).splitlines()
    assert [line[2:].split(":")[0] for line in shown] == [n.name for n in nodes[max(0, at - 10) : at + 11]]
    assert [line[2:].split(":")[0] for line in shown if line.startswith(">")] == [nodes[at].name]


def test_a_tangent_means_nothing_before_differentiation() -> None:
    compilation, program = lowered("zero=0", world=1)
    read_a_tangent_in_forward(program)
    program.level = Level.FORWARD
    verify(program, compilation.captured.fake_mode, {"dp": 2})


def test_roles_print_as_words() -> None:
    assert str(Input(InputKind.SHARD, "a.b")) == "shard a.b" and Input(InputKind.SHARD, "a.b").identifier == "a_b_shard"
    assert str(Output(OutputKind.USER, "0")) == "user 0" and Input(InputKind.TANGENT, "0").identifier == "v_0_tangent"
