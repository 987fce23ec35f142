"""Broken copies elsewhere and back."""

from collections.abc import Iterator

from torch import fx

from graphopt.ir import InputKind, OutputKind, Phase, Program, annotate
from graphopt.ir.copies import COPIED_IN, COPIED_OUT, COPY_IN, COPY_OUT, Copy, copies_of
from tests.mutation.mutators.finding import aten, bypass, calls, first_call, same_value


def _first_back(program: Program) -> fx.Node | None:
    """The wait for a copy back of what forward had sent away."""
    return next((node for node in calls(program, COPIED_IN) if node.all_input_nodes[1].target is COPIED_OUT), None)


def drop_the_wait_for_a_copy_out(program: Program) -> bool:
    wait = first_call(program, COPIED_OUT)
    return wait is not None and bypass(wait, wait.all_input_nodes[0])


def drop_the_wait_for_a_copy_back(program: Program) -> bool:
    wait = first_call(program, COPIED_IN)
    return wait is not None and bypass(wait, wait.all_input_nodes[0])


def wait_for_a_copy_twice(program: Program) -> bool:
    wait = first_call(program, COPIED_IN)
    if wait is None:
        return False
    with program.graph.inserting_after(wait):
        program.graph.node_copy(wait)
    return True


def wait_for_what_is_not_leaving(program: Program) -> bool:
    wait = first_call(program, COPIED_OUT)
    if wait is None:
        return False
    wait.args = (wait.args[1], wait.args[1])
    return True


def read_what_is_elsewhere(program: Program) -> bool:
    wait = _first_back(program)
    return wait is not None and bypass(wait, wait.all_input_nodes[1])


def read_a_parameter_that_is_elsewhere(program: Program) -> bool:
    for _, parameter in program.nodes_of(InputKind.PARAMETER, InputKind.SHARD):
        for wait in [user for user in parameter.users if user.target is COPIED_IN]:
            reader = next(iter(wait.users))
            reader.replace_input_with(wait, parameter)
            return True
    return False


def read_what_has_not_arrived(program: Program) -> bool:
    arriving = first_call(program, COPY_IN)
    if arriving is None:
        return False
    with program.graph.inserting_after(arriving):
        program.graph.call_function(aten.neg.default, (arriving,)).meta = dict(arriving.meta)
    return True


def return_a_result_from_elsewhere(program: Program) -> bool:
    """The same value in every bit, but no tensor of the device."""
    for index, (result, role) in enumerate(zip(program.results, program.outputs, strict=True)):
        if role.kind is OutputKind.USER and result is not None and first_call(program, COPIED_OUT) is not None:
            with program.graph.inserting_after(result):
                leaving = program.graph.call_function(COPY_OUT, (result, "disk"))
            with program.graph.inserting_after(leaving):
                kept = program.graph.call_function(COPIED_OUT, (leaving, result))
            leaving.meta, kept.meta = dict(result.meta), dict(result.meta)
            program.set_results([*program.results[:index], kept, *program.results[index + 1 :]], program.outputs)
            return True
    return False


def copy_back_what_is_here(program: Program) -> bool:
    wait = _first_back(program)
    if wait is None:
        return False
    arriving, kept = wait.all_input_nodes
    value = kept.all_input_nodes[1]
    arriving.args = (value, *arriving.args[1:])
    wait.args = (arriving, value)
    return True


def swap_copies_back(program: Program) -> bool:
    for one, other in _alike(program, is_out=False):
        first, second = one.launch.args[0], other.launch.args[0]
        for copy, source in ((one, second), (other, first)):
            copy.launch.args = (source, *copy.launch.args[1:])
            copy.wait.args = (copy.launch, source)
        return True
    return False


def copy_another_value_out(program: Program) -> bool:
    for one, other in _alike(program, is_out=True):
        value = one.launch.args[0]
        other.launch.args = (value, other.place)
        other.wait.args = (other.launch, value)
        return True
    return False


def hold_on_to_another_value_while_one_leaves(program: Program) -> bool:
    for one, other in _alike(program, is_out=True):
        other.wait.args = (other.launch, one.launch.args[0])
        return True
    return False


def copy_back_before_it_has_left(program: Program) -> bool:
    wait = _first_back(program)
    if wait is None:
        return False
    arriving, kept = wait.all_input_nodes
    kept.prepend(arriving)
    return True


def wait_in_backward_for_a_copy_out(program: Program) -> bool:
    wait = first_call(program, COPIED_OUT)
    if wait is None:
        return False
    program.compute_nodes(Phase.BACKWARD)[0].prepend(wait)
    annotate(wait, phase=Phase.BACKWARD)
    return True


def launch_a_copy_back_in_forward(program: Program) -> bool:
    wait = _first_back(program)
    if wait is None:
        return False
    arriving, _ = wait.all_input_nodes
    program.compute_nodes(Phase.FORWARD)[-1].append(arriving)
    annotate(arriving, phase=Phase.FORWARD)
    return True


def copy_to_an_unknown_place(program: Program) -> bool:
    leaving = first_call(program, COPY_OUT)
    if leaving is None:
        return False
    leaving.args = (leaving.args[0], "tape")
    return True


def copy_back_from_another_place(program: Program) -> bool:
    wait = _first_back(program)
    if wait is None:
        return False
    arriving, _ = wait.all_input_nodes
    arriving.args = (*arriving.args[:-1], "host" if arriving.args[-1] == "disk" else "disk")
    return True


def _alike(program: Program, *, is_out: bool) -> Iterator[tuple[Copy, Copy]]:
    """Copies of values of one type."""
    copies = [copy for copy in copies_of(program) if copy.is_out is is_out]
    for index, one in enumerate(copies):
        for other in copies[index + 1 :]:
            if same_value(one.launch, other.launch):
                yield one, other
