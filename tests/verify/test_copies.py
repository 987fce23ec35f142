"""Rules of copies, each broken on its own in the smallest program that has one."""

import re
from collections.abc import Callable

import pytest
import torch
from torch import fx

from graphopt.errors import VerificationError
from graphopt.ir import OutputKind, Phase, Program, annotate
from graphopt.ir.copies import COPIED_IN, COPIED_OUT, COPY_IN, COPY_OUT
from graphopt.verify.copies import copy_problems
from graphopt.verify.verifier import verify
from tests.support.programs import lowered

PLAN = "offload=disk,offload.least_bytes=0"


def _first(program: Program, target: object) -> fx.Node:
    return next(node for node in program.compute_nodes() if node.target is target)


def launch_without_a_wait(program: Program) -> None:
    wait = _first(program, COPIED_OUT)
    wait.replace_all_uses_with(wait.all_input_nodes[1])
    program.graph.erase_node(wait)


def wait_twice(program: Program) -> None:
    wait = _first(program, COPIED_IN)
    with program.graph.inserting_after(wait):
        program.graph.node_copy(wait)


def wait_for_a_copy_the_other_way(program: Program) -> None:
    _first(program, COPIED_IN).target = COPIED_OUT


def read_before_the_wait(program: Program) -> None:
    _put_behind(program, _first(program, COPY_IN))


def read_elsewhere(program: Program) -> None:
    _put_behind(program, _first(program, COPIED_OUT))


def hold_on_to_another(program: Program) -> None:
    wait = _first(program, COPIED_OUT)
    wait.args = (wait.args[0], program.placeholders[0])


def wait_in_another_phase(program: Program) -> None:
    wait = _first(program, COPIED_OUT)
    program.compute_nodes(Phase.BACKWARD)[0].prepend(wait)
    annotate(wait, phase=Phase.BACKWARD)


def name_no_place(program: Program) -> None:
    launch = _first(program, COPY_OUT)
    launch.args = (launch.args[0], "dsk")


def come_from_another_place(program: Program) -> None:
    launch = _first(program, COPY_IN)
    launch.args = (*launch.args[:-1], "host")


def copy_back_what_is_here(program: Program) -> None:
    launch = _first(program, COPY_IN)
    launch.args = (_first(program, torch.ops.aten.tanh.default), *launch.args[1:])


def copy_what_has_gaps(program: Program) -> None:
    source = _first(program, COPY_OUT).all_input_nodes[0]
    source.meta["val"] = source.meta["val"][:, ::2]


def return_it(program: Program, kind: OutputKind) -> None:
    index = [role.kind for role in program.outputs].index(kind)
    results = [*program.results]
    results[index] = _first(program, COPIED_OUT)
    program.set_results(results, program.outputs)


def return_what_is_elsewhere(program: Program) -> None:
    return_it(program, OutputKind.USER)


def return_a_gradient_of_the_batch_that_is_elsewhere(program: Program) -> None:
    return_it(program, OutputKind.BATCH_GRADIENT)


def _put_behind(program: Program, node: fx.Node) -> None:
    with program.graph.inserting_after(node):
        program.graph.call_function(torch.ops.aten.neg.default, (node,)).meta = dict(node.meta)


BROKEN: list[tuple[Callable[[Program], None], str]] = [
    (launch_without_a_wait, "is waited for 0 times"),
    (wait_twice, "is waited for 2 times"),
    (wait_for_a_copy_the_other_way, "which launches no such copy"),
    (read_before_the_wait, r"is read by neg\w* before it is waited for"),
    (read_elsewhere, r"neg\w* reads copied_out\w*, which is elsewhere; copy it back first"),
    (hold_on_to_another, r"holds on to \w+ until the copy of \w+ is complete"),
    (wait_in_another_phase, r"waits in another phase than copy_out\w* is launched in"),
    (name_no_place, "names the place 'dsk'; known places are host, disk"),
    (come_from_another_place, r"copies back from host what is on disk for copy_out\w*"),
    (copy_back_what_is_here, r"copies back \w+, which is not elsewhere"),
    (copy_what_has_gaps, r"copies \w+, whose elements do not follow each other without gaps"),
    (return_what_is_elsewhere, "is returned as 'user [^']*' but is elsewhere; copy it back first"),
    (return_a_gradient_of_the_batch_that_is_elsewhere, "is returned as 'batch gradient .*' but is elsewhere"),
]


@pytest.mark.parametrize(("harm", "said"), BROKEN, ids=lambda part: getattr(part, "__name__", ""))
def test_each_rule_is_held(harm: Callable[[Program], None], said: str) -> None:
    _, program = lowered(PLAN, world=1)
    harm(program)
    assert any(re.search(said, f"{node.name} {problem}") for node, problem in copy_problems(program))


def test_the_verifier_says_so_with_the_nodes_around() -> None:
    compilation, program = lowered(PLAN, world=1)
    verify(program, compilation.captured.fake_mode)
    read_elsewhere(program)
    with pytest.raises(VerificationError, match=r"reads copied_out\w*, which is elsewhere(.|\n)*\n> neg"):
        verify(program, compilation.captured.fake_mode)


def test_halves_may_hand_on_what_is_elsewhere() -> None:
    compilation, program = lowered(PLAN, world=1)
    assert not list(copy_problems(program))
    for half in (compilation.halves.forward, compilation.halves.backward):
        assert half is not None
        verify(half, compilation.captured.fake_mode)
    saved = [node for _, node in compilation.halves.forward.results_of(OutputKind.SAVED)]
    assert any(node is not None and node.target is COPIED_OUT for node in saved)
