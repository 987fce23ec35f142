"""Broken gathers."""

from torch import fx

from graphopt.ir import (
    InputKind,
    Phase,
    Program,
    annotate,
    facts_of,
)
from graphopt.ir.collectives import sources_of
from tests.mutation.mutators.finding import GATHER, WAIT, alike_pairs, aten, calls, first_call


def gather_the_wrong_parameter(program: Program) -> bool:
    shards = [node for _, node in program.nodes_of(InputKind.SHARD)]
    for one, other in alike_pairs(shards):
        for gather in calls(program, GATHER):
            if one in gather.all_input_nodes and other not in gather.all_input_nodes:
                gather.replace_input_with(one, other)
                return True
    return False


def swap_members_of_a_bucket(program: Program) -> bool:
    for gather in calls(program, GATHER):
        sources = sources_of(gather)
        for one, other in alike_pairs(sources):
            i, j = sources.index(one), sources.index(other)
            sources[i], sources[j] = other, one
            gather.args = (sources, *gather.args[1:])
            return True
    return False


def gather_from_too_many_ranks(program: Program) -> bool:
    gather = first_call(program, GATHER)
    if gather is None:
        return False
    gather.args = (gather.args[0], gather.args[1] * 2, gather.args[2])  # type: ignore[operator]
    return True


def gather_over_another_axis(program: Program) -> bool:
    gather = first_call(program, GATHER)
    if gather is None:
        return False
    gather.args = (*gather.args[:-1], "tp")
    return True


def keep_what_was_gathered_for_forward(program: Program) -> bool:
    """Backward reads the forward's copy: its memory is not freed in between."""
    for late in calls(program, WAIT):
        if facts_of(late).phase is not Phase.BACKWARD or facts_of(late).resident:
            continue
        for early in calls(program, WAIT):
            if facts_of(early).phase is Phase.FORWARD and _gathered(early) == _gathered(late) is not None:
                late.replace_all_uses_with(early)
                return True
    return False


def _gathered(wait: fx.Node) -> str | None:
    """Name of the shard that a wait gives whole."""
    item = wait.all_input_nodes[0]
    launched = item.all_input_nodes[0]
    return sources_of(launched)[int(str(item.args[1]))].name if launched.target is GATHER else None


def use_padding_as_rows(program: Program) -> bool:
    for node in calls(program, aten.slice.Tensor):
        if node.all_input_nodes[0].target is WAIT and isinstance(node.args[3], int):
            node.args = (node.args[0], 0, 1, node.args[3] + 1)
            return True
    return False


def read_a_gathered_parameter_as_another(program: Program) -> bool:
    waits = [node for node in calls(program, WAIT) if _gathered(node) is not None]
    for one, other in alike_pairs(waits):
        if _gathered(one) != _gathered(other) and facts_of(one).phase is facts_of(other).phase:
            user = next(iter(other.users))
            if one < user:
                user.replace_input_with(other, one)
                return True
    return False


def state_another_lifetime(program: Program) -> bool:
    gather = first_call(program, GATHER)
    if gather is None:
        return False
    annotate(next(iter(next(iter(gather.users)).users)), resident=not facts_of(gather).resident)
    return True
