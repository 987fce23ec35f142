"""The verifier accepts what the passes make and refuses what is broken on purpose."""

from collections.abc import Callable

import pytest
import torch
from torch import fx

from graphopt.errors import VerificationError
from graphopt.ir import Input, InputKind, Output, OutputKind, Phase, Program, annotate
from graphopt.ir.collectives import collectives_of
from graphopt.ir.structural_hash import structural_hash
from graphopt.ir.verifier import verify
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


MUTATIONS: list[Callable[[Program], None]] = [
    drop_a_wait, wait_twice, read_before_waiting, change_a_dtype, change_a_shape, read_backward_in_forward,
    write_in_place, use_before_definition, lose_a_role, give_a_role_twice, lose_an_output,
]  # fmt: skip


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_lowered_programs_are_valid(stage: int) -> None:
    compilation, program = lowered(f"zero={stage},zero.whole_below=0")
    verify(program, compilation.captured.fake_mode)
    for half in (compilation.halves.forward, compilation.halves.backward):
        assert half is not None
        verify(half, compilation.captured.fake_mode)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.__name__)
def test_broken_programs_are_refused(mutation: Callable[[Program], None]) -> None:
    compilation, program = lowered("zero=3,zero.whole_below=0")
    before = structural_hash(program)
    mutation(program)
    assert structural_hash(program) != before
    with pytest.raises(VerificationError):
        verify(program, compilation.captured.fake_mode)


def test_the_hash_does_not_depend_on_names_but_on_order() -> None:
    first, second = (lowered("zero=3,zero.whole_below=0")[1] for _ in range(2))
    assert structural_hash(first) == structural_hash(second)
    launched = [c.node for c in collectives_of(second)]
    launched[0].prepend(launched[1])
    assert structural_hash(first) != structural_hash(second)


def test_roles_print_as_words() -> None:
    assert str(Input(InputKind.SHARD, "a.b")) == "shard a.b" and Input(InputKind.SHARD, "a.b").identifier == "a_b_shard"
    assert str(Output(OutputKind.USER, "0")) == "user 0" and Input(InputKind.TANGENT, "0").identifier == "v_0_tangent"
