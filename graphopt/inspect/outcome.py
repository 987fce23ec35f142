"""What a step gives on all ranks: outputs, new buffers and mean gradients, of the model itself or of a program."""

import copy
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from graphopt.capture.arguments import flatten_call
from graphopt.capture.checkpoints import without_regions
from graphopt.capture.export import kept_as_stored
from graphopt.capture.structure import take_apart
from graphopt.inspect.exchanges import Exchanges, Values
from graphopt.inspect.simulate import SeededDraws, Simulation
from graphopt.inspect.workload import Workload
from graphopt.ir import Input, InputKind, Level, OutputKind, ParameterLayout, Program, Split

Outcome = dict[str, list[torch.Tensor]]  # by role: on each rank what it has, gradients whole and as means


def eager_outcome(workload: Workload) -> Outcome:
    """The model itself, on each replica's batch in turn."""
    runs = [_eager_run(workload, workload.batch(replica), replica) for replica in range(workload.replicas)]
    found: Outcome = {}
    for outputs in zip(*((run.users | run.buffers).items() for run in runs), strict=True):
        found[outputs[0][0]] = workload.on_ranks([value for _, value in outputs])
    local = {name: workload.on_ranks([run.gradients[name] for run in runs]) for name in runs[0].gradients}
    return found | _means(workload, local)


def whole_batch_outcome(workload: Workload) -> Outcome:
    """The model itself, on the batches of all replicas as one; of its outputs the scalars, as means over the ranks."""
    parts = [workload.batch(replica) for replica in range(workload.replicas)]
    whole = [torch.cat(tensors) if tensors[0].dim() else tensors[0] for tensors in zip(*parts, strict=True)]
    run = _eager_run(workload, whole, 0)
    found: Outcome = {role: [value] for role, value in run.users.items() if value.dim() == 0}
    everywhere = run.buffers | {f"gradient {name}": _at_least_float32(value) for name, value in run.gradients.items()}
    return found | {role: [value] * workload.ranks for role, value in everywhere.items()}


@dataclass(frozen=True)
class _EagerRun:
    """Outputs and buffers by role, gradients by parameter."""

    users: dict[str, torch.Tensor]
    buffers: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor]


def _eager_run(workload: Workload, batch: list[torch.Tensor], replica: int) -> _EagerRun:
    model = copy.deepcopy(workload.model)
    if workload.dtype is not None:
        stored = kept_as_stored(model)
        for parameter in model.parameters():
            if id(parameter) not in stored:
                parameter.data = workload.computed(parameter.data)
    _, spec = flatten_call(workload.args, workload.kwargs)
    args, kwargs = spec.rebuild(batch)
    outputs: list[torch.Tensor] = []
    with SeededDraws(replica), without_regions():
        take_apart(model(*args, **kwargs), outputs)
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        gradients = _gradients(workload, outputs, parameters)
    return _EagerRun(
        {f"user {index}": output.detach() for index, output in enumerate(outputs)},
        {f"buffer {name}": buffer for name, buffer in model.named_buffers()},
        gradients,
    )


def program_outcome(program: Program, workload: Workload, *, gradients: bool = True) -> Outcome:
    """A program of either level, on all ranks at once; gradients: whether those of a forward program are asked for."""
    training = program.level is Level.FORWARD and any(workload.seeded) and gradients
    inputs = inputs_of(program, workload, leaves=training)
    with torch.enable_grad() if training else torch.no_grad():
        results = _results(program, workload, inputs)
    users = [
        _joined(workload, values, role.splits)
        for role, values in zip(program.outputs, results, strict=True)
        if role.kind is OutputKind.USER
    ]
    found: Outcome = {f"user {index}": [value.detach() for value in values] for index, values in enumerate(users)}
    found |= {f"buffer {name}": [buffer] * workload.ranks for name, buffer in workload.model.named_buffers()}
    for role, values in zip(program.outputs, results, strict=True):
        if role.kind is OutputKind.BUFFER:
            found[str(role)] = [value.detach() for value in values]
    if training:
        return found | _autograd_gradients(program, workload, inputs, results)
    local = {
        role.name: _whole(workload, role.name, values, sharded=program.reduced)
        for role, values in zip(program.outputs, results, strict=True)
        if role.kind is OutputKind.GRADIENT and values[0] is not None
    }
    if program.reduced:
        return found | {f"gradient {name}": values for name, values in local.items()}
    return found | _means(workload, local)


def inputs_of(program: Program, workload: Workload, *, leaves: bool = False) -> list[Values]:
    """For each placeholder its value on each rank; leaves: parameters are leaves of autograd, one a rank."""
    parameters: dict[str, torch.Tensor] = dict(workload.model.named_parameters())
    if workload.ranks > 1:  # distributed parameters are contiguous
        parameters = {name: parameter.contiguous() for name, parameter in parameters.items()}
    buffers = dict(workload.model.named_buffers())
    batches = [
        dict(zip(workload.names, workload.batch(place[workload.data_axis]), strict=True)) for place in workload.places
    ]
    given: list[Values] = []
    for role, node in zip(program.inputs, program.placeholders, strict=True):
        if role.kind in (InputKind.PARAMETER, InputKind.SHARD):
            layout = workload.layouts[role.name]
            parts = [layout.part(parameters[role.name].detach(), place).contiguous() for place in workload.places]
            if role.kind is InputKind.SHARD:
                places = (place[layout.axis] for place in workload.places)
                given.append([_shard(part, layout, place) for part, place in zip(parts, places, strict=True)])
                continue
            copies = [part.to(node.meta["val"].dtype, copy=True) for part in parts]
            given.append([each.requires_grad_(leaves and role.requires_grad) for each in copies])
        elif role.kind is InputKind.BUFFER:
            given.append([buffers[role.name].clone() for _ in range(workload.ranks)])
        elif role.kind is InputKind.CONSTANT:
            given.append([program.constants[role.name]] * workload.ranks)
        elif role.kind is InputKind.BATCH:
            given.append([batch[role.name] if leaves else batch[role.name].detach() for batch in batches])
        else:
            given.append([_tangent(program, workload, role, node)] * workload.ranks)
    return given


def _tangent(program: Program, workload: Workload, role: Input, node: fx.Node) -> torch.Tensor:
    users = [output.name for output in program.outputs if output.kind is OutputKind.USER]
    shape = [int(size) for size in node.meta["val"].shape]
    return workload.tangent(users.index(role.name), torch.empty(shape, dtype=node.meta["val"].dtype))


def _results(program: Program, workload: Workload, inputs: list[Values]) -> list[Values]:
    """The program's outputs on each rank."""
    values = dict(zip(program.placeholders, inputs, strict=True))
    values.update(Simulation(program, workload.mesh, workload.data_axis).run(inputs))
    return [[None] * workload.ranks if node is None else values[node] for node in program.results]


def _autograd_gradients(program: Program, workload: Workload, inputs: list[Values], results: list[Values]) -> Outcome:
    """Means of what autograd gives the ranks' leaves, whose graphs may be joined by collectives and moves.

    One rank of each replica is told of the gradient of an output, so that leaves of all its ranks have a summand.
    """
    users = [v for role, v in zip(program.outputs, results, strict=True) if role.kind is OutputKind.USER]
    outputs: list[torch.Tensor] = []
    tangents: list[torch.Tensor] = []
    for position, (seeded, values) in enumerate(zip(workload.seeded, users, strict=True)):
        for place, value in zip(workload.places, values, strict=True):
            if seeded and not any(place[axis] for axis in workload.model_axes):
                outputs.append(value)
                tangents.append(workload.tangent(position, value))
    wanted = [
        (role.name, values)
        for role, values in zip(program.inputs, inputs, strict=True)
        if role.kind is InputKind.PARAMETER and role.requires_grad
    ]
    flat = [value for _, values in wanted for value in values]
    found = iter(torch.autograd.grad(outputs, flat, tangents, allow_unused=True))
    exchanges, local = Exchanges(workload.mesh), {}
    for name, values in wanted:
        gradients = list(itertools.islice(found, len(values)))
        if any(gradient is not None for gradient in gradients):
            summands = [torch.zeros_like(v) if g is None else g for v, g in zip(values, gradients, strict=True)]
            for axis in set(workload.model_axes) - {split.axis for split in workload.layouts[name].splits}:
                summands = exchanges.reduced(summands, axis)
            local[name] = _whole(workload, name, summands, sharded=False)
    return _means(workload, local)


def _gradients(
    workload: Workload, outputs: list[torch.Tensor], parameters: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Gradients of one rank in eager, by parameter; those that the outputs do not reach are left out."""
    seeded = [(i, o) for i, (o, flag) in enumerate(zip(outputs, workload.seeded, strict=True)) if flag]
    if not seeded or not parameters:
        return {}
    found = torch.autograd.grad(
        [output for _, output in seeded],
        list(parameters.values()),
        [workload.tangent(index, output) for index, output in seeded],
        allow_unused=True,
    )
    return {name: g for name, g in zip(parameters, found, strict=True) if g is not None}


def _means(workload: Workload, local: Mapping[str, Values]) -> Outcome:
    """Sums in the order of the replicas, divided by their number, at least in float32."""
    exchanges, found = Exchanges(workload.mesh), {}
    for name, values in local.items():
        totals = exchanges.reduced([_at_least_float32(value) for value in values], workload.data_axis)
        found[f"gradient {name}"] = [total / workload.replicas for total in totals]
    return found


def _at_least_float32(value: torch.Tensor) -> torch.Tensor:
    return value.float() if value.dtype in (torch.bfloat16, torch.float16) else value


def _shard(part: torch.Tensor, layout: ParameterLayout, place: int) -> torch.Tensor:
    """One data-parallel rank's rows of what its program sees of a parameter, padded to be equal."""
    rows = part.reshape(layout.rows, *layout.row_shape)
    padded = rows.new_zeros(layout.gathered_shape)
    padded[: layout.rows] = rows
    return padded.chunk(layout.ranks)[place].clone()


def _whole(workload: Workload, name: str, values: Values, *, sharded: bool) -> Values:
    """On each rank the whole gradient, from the parts of those that split it; sharded: and from the shards, if any."""
    layout = workload.layouts[name]
    if sharded and not layout.is_whole:
        gathered = Exchanges(workload.mesh).gathered(values, 0, layout.axis)
        values = [each[: layout.rows].reshape(layout.shape) for each in gathered]
    return _joined(workload, values, layout.splits)


def _joined(workload: Workload, values: Values, splits: Sequence[Split]) -> Values:
    """On each rank the whole of what is split, in this order of axes."""
    for split in reversed(splits):
        values = Exchanges(workload.mesh).gathered(values, split.dim, split.axis)
    return values
