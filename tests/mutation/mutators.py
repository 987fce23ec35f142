"""Ways to break a correct program. Each changes the program it is given, or returns False where it does not apply."""

import itertools
import operator
from collections.abc import Callable, Iterator

import torch
from torch import fx

from graphopt.ir import (
    Effect,
    Input,
    InputKind,
    Output,
    OutputKind,
    Phase,
    Program,
    annotate,
    effect_of,
    facts_of,
)
from graphopt.ir.collectives import collectives_of, sources_of

aten = torch.ops.aten
functional = torch.ops._c10d_functional
WAIT = functional.wait_tensor.default
GATHER = functional.all_gather_into_tensor_coalesced.default
SCATTER = functional.reduce_scatter_tensor_coalesced.default
REDUCE = functional.all_reduce_coalesced.default

Mutator = Callable[[Program], bool]
MUTATORS: dict[str, Mutator] = {}


def mutator(function: Mutator) -> Mutator:
    """Enter a way to break a program into the table, under its own name."""
    MUTATORS[function.__name__] = function
    return function


# What mutators look for.


def _calls(program: Program, *targets: object) -> Iterator[fx.Node]:
    return (node for node in program.compute_nodes() if not targets or node.target in targets)


def _first(program: Program, *targets: object) -> fx.Node | None:
    return next(_calls(program, *targets), None)


def _same_value(one: fx.Node, other: fx.Node) -> bool:
    a, b = one.meta.get("val"), other.meta.get("val")
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return False
    return a.shape == b.shape and a.dtype == b.dtype and a.stride() == b.stride()


def _pairs(nodes: list[fx.Node]) -> Iterator[tuple[fx.Node, fx.Node]]:
    return ((a, b) for i, a in enumerate(nodes) for b in nodes[i + 1 :] if _same_value(a, b))


def _mean(program: Program) -> fx.Node | None:
    """The division that makes a sum over ranks their mean."""
    waits = _calls(program, WAIT)
    return next((u for w in waits for u in w.users if u.target is aten.div.Tensor and isinstance(u.args[1], int)), None)


def _bypass(node: fx.Node, source: fx.Node) -> bool:
    node.replace_all_uses_with(source)
    node.graph.erase_node(node)
    return True


def _arithmetic(program: Program) -> fx.Node | None:
    """A product of two values of one type, which is not its own mirror image."""
    for node in _calls(program, aten.mul.Tensor, aten.add.Tensor):
        if len(node.all_input_nodes) == 2 and all(_same_value(node, s) for s in node.all_input_nodes):
            return node
    return None


# Waiting and launching.


@mutator
def drop_a_wait(program: Program) -> bool:
    wait = _first(program, WAIT)
    return wait is not None and _bypass(wait, wait.all_input_nodes[0])


@mutator
def wait_twice(program: Program) -> bool:
    wait = _first(program, WAIT)
    if wait is None:
        return False
    with program.graph.inserting_after(wait):
        program.graph.node_copy(wait)
    return True


@mutator
def read_in_flight(program: Program) -> bool:
    wait = _first(program, WAIT)
    if wait is None:
        return False
    item = wait.all_input_nodes[0]
    with program.graph.inserting_after(item):
        program.graph.call_function(aten.neg.default, (item,)).meta = dict(item.meta)
    return True


@mutator
def wait_for_a_value(program: Program) -> bool:
    node = next((n for n in _calls(program) if isinstance(n.meta["val"], torch.Tensor) and n.target is not WAIT), None)
    if node is None or _first(program, WAIT) is None:
        return False
    with program.graph.inserting_after(node):
        waited = program.graph.call_function(WAIT, (node,))
    waited.meta = dict(node.meta)
    return True


@mutator
def take_an_item_twice(program: Program) -> bool:
    for gather in _calls(program, GATHER, SCATTER):
        items = list(gather.users)
        for one, other in _pairs(items):
            one.args = other.args
            return True
    return False


@mutator
def swap_items(program: Program) -> bool:
    for gather in _calls(program, GATHER):
        for one, other in _pairs(list(gather.users)):
            one.args, other.args = other.args, one.args
            return True
    return False


@mutator
def forget_an_item(program: Program) -> bool:
    for gather in _calls(program, GATHER):
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


@mutator
def launch_twice(program: Program) -> bool:
    gather = _first(program, GATHER)
    if gather is None:
        return False
    with program.graph.inserting_after(gather):
        program.graph.node_copy(gather)
    return True


@mutator
def launch_after_the_wait(program: Program) -> bool:
    gather = _first(program, GATHER, SCATTER, REDUCE)
    if gather is None:
        return False
    wait = next(iter(next(iter(gather.users)).users))
    wait.append(gather)
    return True


# What is gathered.


@mutator
def gather_the_wrong_parameter(program: Program) -> bool:
    shards = [node for _, node in program.nodes_of(InputKind.SHARD)]
    for one, other in _pairs(shards):
        for gather in _calls(program, GATHER):
            if one in gather.all_input_nodes and other not in gather.all_input_nodes:
                gather.replace_input_with(one, other)
                return True
    return False


@mutator
def swap_members_of_a_bucket(program: Program) -> bool:
    for gather in _calls(program, GATHER):
        sources = sources_of(gather)
        for one, other in _pairs(sources):
            i, j = sources.index(one), sources.index(other)
            sources[i], sources[j] = other, one
            gather.args = (sources, *gather.args[1:])
            return True
    return False


@mutator
def gather_from_too_many_ranks(program: Program) -> bool:
    gather = _first(program, GATHER)
    if gather is None:
        return False
    gather.args = (gather.args[0], gather.args[1] * 2, gather.args[2])  # type: ignore[operator]
    return True


@mutator
def gather_over_another_axis(program: Program) -> bool:
    gather = _first(program, GATHER)
    if gather is None:
        return False
    gather.args = (*gather.args[:-1], "tp")
    return True


@mutator
def keep_what_was_gathered_for_forward(program: Program) -> bool:
    """Backward reads the forward's copy: its memory is not freed in between."""
    for late in _calls(program, WAIT):
        if facts_of(late).phase is not Phase.BACKWARD or facts_of(late).resident:
            continue
        for early in _calls(program, WAIT):
            if facts_of(early).phase is Phase.FORWARD and _gathered(early) == _gathered(late) is not None:
                late.replace_all_uses_with(early)
                return True
    return False


def _gathered(wait: fx.Node) -> str | None:
    """Name of the shard that a wait gives whole."""
    item = wait.all_input_nodes[0]
    launched = item.all_input_nodes[0]
    return sources_of(launched)[int(str(item.args[1]))].name if launched.target is GATHER else None


@mutator
def use_padding_as_rows(program: Program) -> bool:
    for node in _calls(program, aten.slice.Tensor):
        if node.all_input_nodes[0].target is WAIT and isinstance(node.args[3], int):
            node.args = (node.args[0], 0, 1, node.args[3] + 1)
            return True
    return False


@mutator
def read_a_gathered_parameter_as_another(program: Program) -> bool:
    waits = [node for node in _calls(program, WAIT) if _gathered(node) is not None]
    for one, other in _pairs(waits):
        if _gathered(one) != _gathered(other) and facts_of(one).phase is facts_of(other).phase:
            user = next(iter(other.users))
            if one < user:
                user.replace_input_with(other, one)
                return True
    return False


@mutator
def state_another_lifetime(program: Program) -> bool:
    gather = _first(program, GATHER)
    if gather is None:
        return False
    annotate(next(iter(next(iter(gather.users)).users)), resident=not facts_of(gather).resident)
    return True


# How gradients are reduced.


@mutator
def forget_the_mean(program: Program) -> bool:
    mean = _mean(program)
    return mean is not None and _bypass(mean, mean.all_input_nodes[0])


@mutator
def divide_by_another_number(program: Program) -> bool:
    mean = _mean(program)
    if mean is None:
        return False
    mean.args = (mean.args[0], mean.args[1] + 1)  # type: ignore[operator]
    return True


@mutator
def take_the_mean_twice(program: Program) -> bool:
    mean = _mean(program)
    if mean is None:
        return False
    with program.graph.inserting_after(mean):
        again = program.graph.node_copy(mean)
    mean.replace_all_uses_with(again)
    again.args = (mean, mean.args[1])
    return True


@mutator
def reduce_twice(program: Program) -> bool:
    mean = _mean(program)
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


@mutator
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


@mutator
def do_not_reduce(program: Program) -> bool:
    """The rank's own rows of its own gradient."""
    for scatter in _calls(program, SCATTER):
        item = next(i for i in scatter.users if i.args[1] == 0)
        wait = next(iter(item.users))
        rows = wait.meta["val"].shape[0]
        with program.graph.inserting_after(wait):
            own = program.graph.call_function(aten.slice.Tensor, (sources_of(scatter)[0], 0, 0, rows))
        own.meta = dict(wait.meta)
        return bool(wait.replace_all_uses_with(own)) or True
    return False


@mutator
def reduce_by_the_maximum(program: Program) -> bool:
    for node in _calls(program, SCATTER, REDUCE):
        node.args = (node.args[0], "max", *node.args[2:])
        return True
    return False


@mutator
def reduce_over_another_axis(program: Program) -> bool:
    for node in _calls(program, SCATTER, REDUCE):
        node.args = (*node.args[:-1], "tp")
        return True
    return False


@mutator
def swap_what_is_reduced(program: Program) -> bool:
    for node in _calls(program, SCATTER):
        sources = sources_of(node)
        for one, other in _pairs(sources):
            i, j = sources.index(one), sources.index(other)
            sources[i], sources[j] = other, one
            node.args = (sources, *node.args[1:])
            return True
    return False


@mutator
def swap_gradients(program: Program) -> bool:
    results = list(program.results)
    indices = [
        i for i, role in enumerate(program.outputs) if role.kind is OutputKind.GRADIENT and results[i] is not None
    ]
    for i in indices:
        for j in indices:
            if i < j and _same_value(results[i], results[j]):  # type: ignore[arg-type]
                results[i], results[j] = results[j], results[i]
                program.set_results(results, program.outputs)
                return True
    return False


@mutator
def lose_a_gradient(program: Program) -> bool:
    results = list(program.results)
    for index, role in enumerate(program.outputs):
        if role.kind is OutputKind.GRADIENT and results[index] is not None:
            results[index] = None
            program.set_results(results, program.outputs)
            return True
    return False


@mutator
def lose_a_tied_gradient(program: Program) -> bool:
    """Of a sum of gradients, the part of one use."""
    for node in _calls(program, aten.add.Tensor):
        sources = node.all_input_nodes
        is_sum = len(sources) == 2 and facts_of(node).phase is Phase.BACKWARD
        if is_sum and all(facts_of(s).phase is Phase.BACKWARD and _same_value(node, s) for s in sources):
            return _bypass(node, sources[0])
    return False


@mutator
def lose_the_cast_to_the_stored_dtype(program: Program) -> bool:
    for role, node in program.results_of(OutputKind.GRADIENT):
        if role and node is not None and node.target is aten._to_copy.default:
            return _bypass(node, node.all_input_nodes[0])
    return False


# What is computed.


@mutator
def state_another_dtype(program: Program) -> bool:
    node = _arithmetic(program)
    if node is None:
        return False
    node.meta["val"] = node.meta["val"].double()
    return True


@mutator
def round_to_half(program: Program) -> bool:
    """Types stay as they were."""
    node = _arithmetic(program)
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


@mutator
def compute_another_operation(program: Program) -> bool:
    node = _arithmetic(program)
    if node is None:
        return False
    node.target = aten.sub.Tensor
    return True


@mutator
def compute_another_shape(program: Program) -> bool:
    node = _first(
        program, aten.tanh.default, aten.neg.default, aten.relu.default, aten.rsqrt.default, aten.silu.default
    )
    if node is None:
        return False
    node.target = aten.sum.default
    return True


@mutator
def swap_operands(program: Program) -> bool:
    for node in _calls(program, aten.sub.Tensor, aten.div.Tensor, aten.mm.default, aten.bmm.default):
        sources = node.all_input_nodes
        if len(sources) == 2 and sources[0].meta["val"].shape == sources[1].meta["val"].shape:
            node.args = (node.args[1], node.args[0], *node.args[2:])
            return True
    return False


@mutator
def change_a_constant(program: Program) -> bool:
    for node in _calls(program):
        for index, argument in enumerate(node.args):
            if isinstance(argument, float):
                node.update_arg(index, argument * 2 + 1)
                return True
    return False


@mutator
def reduce_along_another_dimension(program: Program) -> bool:
    for node in _calls(program, aten._softmax.default, aten._log_softmax.default):
        dims = node.meta["val"].dim()
        node.args = (node.args[0], (int(str(node.args[1])) % dims) - 1, *node.args[2:])
        return True
    return False


@mutator
def flip_a_flag(program: Program) -> bool:
    for node in _calls(program):
        for index, argument in enumerate(node.args):
            if isinstance(argument, bool) and effect_of(node) is Effect.PURE:
                node.update_arg(index, not argument)
                return True
    return False


@mutator
def read_another_value(program: Program) -> bool:
    node = _arithmetic(program)
    if node is None:
        return False
    one, other = node.all_input_nodes
    node.args = (one, one, *node.args[2:]) if one is not other else node.args
    return one is not other


@mutator
def skip_an_operation(program: Program) -> bool:
    node = _arithmetic(program)
    return node is not None and _bypass(node, node.all_input_nodes[0])


@mutator
def read_a_saved_value_of_another_layer(program: Program) -> bool:
    forward = [n for n in program.compute_nodes(Phase.FORWARD) if facts_of(n).layer]
    for one, other in _pairs(forward):
        if facts_of(one).layer == facts_of(other).layer or one.target is not other.target:
            continue
        users = [user for user in other.users if facts_of(user).phase is Phase.BACKWARD]
        if users and effect_of(one) is Effect.PURE:
            users[0].replace_input_with(other, one)
            return True
    return False


@mutator
def keep_a_stale_buffer(program: Program) -> bool:
    buffers = {role.name: node for role, node in program.nodes_of(InputKind.BUFFER)}
    results = list(program.results)
    for index, role in enumerate(program.outputs):
        if role.kind is OutputKind.BUFFER and results[index] is not buffers.get(role.name):
            results[index] = buffers[role.name]
            program.set_results(results, program.outputs)
            return True
    return False


@mutator
def read_a_tangent_in_forward(program: Program) -> bool:
    tangent = next((node for _, node in program.nodes_of(InputKind.TANGENT)), None)
    for node in program.compute_nodes(Phase.FORWARD):
        source = next((s for s in node.all_input_nodes if tangent is not None and _same_value(s, tangent)), None)
        if source is not None and tangent is not None:
            node.replace_input_with(source, tangent)
            return True
    return False


# Effects.


def _random(program: Program) -> list[fx.Node]:
    return [node for node in _calls(program) if effect_of(node) is Effect.RANDOM]


@mutator
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


@mutator
def draw_once_more(program: Program) -> bool:
    for node in _random(program):
        with program.graph.inserting_after(node):
            program.graph.node_copy(node)
        return True
    return False


@mutator
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


@mutator
def write_in_place(program: Program) -> bool:
    node = _first(program, aten.mul.Tensor)
    if node is None:
        return False
    node.target = aten.mul_.Tensor
    return True


@mutator
def repeat_an_operation_in_place(program: Program) -> bool:
    """The published fault: a recompute divides a saved dropout mask a second time."""
    node = _arithmetic(program)
    if node is None:
        return False
    with program.graph.inserting_after(node):
        program.graph.call_function(aten.div_.Tensor, (node, 0.5)).meta = dict(node.meta)
    return True


# Order and roles.


@mutator
def use_before_definition(program: Program) -> bool:
    node = next(n for n in _calls(program) if n.users)
    program.output_node.prepend(node)
    return True


@mutator
def move_a_forward_node_to_backward(program: Program) -> bool:
    node = next((n for n in program.compute_nodes(Phase.FORWARD) if n.users), None)
    if node is None:
        return False
    annotate(node, phase=Phase.BACKWARD)
    return True


@mutator
def return_a_backward_value(program: Program) -> bool:
    backward = program.compute_nodes(Phase.BACKWARD)
    results = list(program.results)
    for index, role in enumerate(program.outputs):
        if role.kind is OutputKind.USER and backward:
            results[index] = backward[-1]
            program.set_results(results, program.outputs)
            return True
    return False


@mutator
def lose_a_role(program: Program) -> bool:
    program.inputs.pop()
    return True


@mutator
def give_a_role_twice(program: Program) -> bool:
    program.inputs[1] = program.inputs[0]
    return True


@mutator
def swap_roles_of_inputs(program: Program) -> bool:
    nodes = program.placeholders
    for one, other in _pairs(nodes):
        i, j = nodes.index(one), nodes.index(other)
        if one.users and other.users:
            program.inputs[i], program.inputs[j] = program.inputs[j], program.inputs[i]
            return True
    return False


@mutator
def name_a_gradient_after_another(program: Program) -> bool:
    indices = [i for i, role in enumerate(program.outputs) if role.kind is OutputKind.GRADIENT]
    if len(indices) < 2:
        return False
    i, j = indices[:2]
    program.outputs[i], program.outputs[j] = program.outputs[j], program.outputs[i]
    return program.results[i] is not None or program.results[j] is not None


@mutator
def lose_a_result(program: Program) -> bool:
    results = list(program.results)
    results[0] = None
    program.set_results(results, program.outputs)
    return program.outputs[0].kind is not OutputKind.GRADIENT


@mutator
def add_a_result_without_meaning(program: Program) -> bool:
    program.set_results(
        [*program.results, program.placeholders[0]], [*program.outputs, Output(OutputKind.SAVED, "extra")]
    )
    return True


@mutator
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


@mutator
def lose_a_constant(program: Program) -> bool:
    if not program.constants:
        return False
    program.constants.pop(next(iter(program.constants)))
    return True


@mutator
def read_a_node_of_another_graph(program: Program) -> bool:
    node = next(n for n in _calls(program) if n.all_input_nodes)
    stranger = fx.Graph().placeholder("stranger")
    stranger.meta = dict(node.all_input_nodes[0].meta)
    node.replace_input_with(node.all_input_nodes[0], stranger)
    return True
