"""Broken reductions of gradients."""

from graphopt.ir import (
    OutputKind,
    Phase,
    Program,
    facts_of,
)
from graphopt.ir.collectives import collectives_of, sources_of
from tests.mutation.mutators.finding import (
    REDUCE,
    SCATTER,
    WAIT,
    alike_pairs,
    aten,
    bypass,
    calls,
    find_mean,
    functional,
    same_value,
)


def forget_the_mean(program: Program) -> bool:
    mean = find_mean(program)
    return mean is not None and bypass(mean, mean.all_input_nodes[0])


def divide_by_another_number(program: Program) -> bool:
    mean = find_mean(program)
    if mean is None:
        return False
    mean.args = (mean.args[0], mean.args[1] + 1)  # type: ignore[operator]
    return True


def take_the_mean_twice(program: Program) -> bool:
    mean = find_mean(program)
    if mean is None:
        return False
    with program.graph.inserting_after(mean):
        again = program.graph.node_copy(mean)
    mean.replace_all_uses_with(again)
    again.args = (mean, mean.args[1])
    return True


def reduce_twice(program: Program) -> bool:
    mean = find_mean(program)
    if mean is None:
        return False
    wait = mean.all_input_nodes[0]
    with program.graph.inserting_after(wait):
        launched = program.graph.call_function(functional.all_reduce.default, (wait, "sum", "dp"))
        launched.meta = dict(wait.meta)
    with program.graph.inserting_after(launched):
        again = program.graph.call_function(WAIT, (launched,))
        again.meta = dict(wait.meta)
    mean.replace_input_with(wait, again)
    return True


def reduce_the_local_gradient_twice(program: Program) -> bool:
    for collective in collectives_of(program):
        source = sources_of(collective.node)[0]
        if collective.kind == "all-gather" or source.op == "placeholder":
            continue
        with program.graph.inserting_after(source):
            launched = program.graph.call_function(functional.all_reduce.default, (source, "sum", collective.axis))
            launched.meta = dict(source.meta)
        with program.graph.inserting_after(launched):
            again = program.graph.call_function(WAIT, (launched,))
            again.meta = dict(source.meta)
        collective.node.replace_input_with(source, again)
        return True
    return False


def do_not_reduce(program: Program) -> bool:
    """The rank's own rows of its own gradient."""
    for scatter in calls(program, SCATTER):
        item = next(i for i in scatter.users if i.args[1] == 0)
        wait = next(iter(item.users))
        rows = wait.meta["val"].shape[0]
        with program.graph.inserting_after(wait):
            own = program.graph.call_function(aten.slice.Tensor, (sources_of(scatter)[0], 0, 0, rows))
        own.meta = dict(wait.meta)
        return bool(wait.replace_all_uses_with(own)) or True
    return False


def reduce_by_the_maximum(program: Program) -> bool:
    for node in calls(program, SCATTER, REDUCE):
        node.args = (node.args[0], "max", *node.args[2:])
        return True
    return False


def reduce_over_another_axis(program: Program) -> bool:
    for node in calls(program, SCATTER, REDUCE):
        node.args = (*node.args[:-1], "tp")
        return True
    return False


def swap_what_is_reduced(program: Program) -> bool:
    for node in calls(program, SCATTER):
        sources = sources_of(node)
        for one, other in alike_pairs(sources):
            i, j = sources.index(one), sources.index(other)
            sources[i], sources[j] = other, one
            node.args = (sources, *node.args[1:])
            return True
    return False


def swap_gradients(program: Program) -> bool:
    results = list(program.results)
    indices = [
        i for i, role in enumerate(program.outputs) if role.kind is OutputKind.GRADIENT and results[i] is not None
    ]
    for i in indices:
        for j in indices:
            if i < j and same_value(results[i], results[j]):  # type: ignore[arg-type]
                results[i], results[j] = results[j], results[i]
                program.set_results(results, program.outputs)
                return True
    return False


def lose_a_gradient(program: Program) -> bool:
    results = list(program.results)
    for index, role in enumerate(program.outputs):
        if role.kind is OutputKind.GRADIENT and results[index] is not None:
            results[index] = None
            program.set_results(results, program.outputs)
            return True
    return False


def lose_a_tied_gradient(program: Program) -> bool:
    """Of a sum of gradients, the part of one use."""
    for node in calls(program, aten.add.Tensor):
        sources = node.all_input_nodes
        is_sum = len(sources) == 2 and facts_of(node).phase is Phase.BACKWARD
        if is_sum and all(facts_of(s).phase is Phase.BACKWARD and same_value(node, s) for s in sources):
            return bypass(node, sources[0])
    return False


def lose_the_cast_to_the_stored_dtype(program: Program) -> bool:
    for role, node in program.results_of(OutputKind.GRADIENT):
        if role and node is not None and node.target is aten._to_copy.default:
            return bypass(node, node.all_input_nodes[0])
    return False
