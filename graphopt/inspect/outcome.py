"""What a step gives on all ranks: outputs, new buffers and mean gradients, of the model itself or of a program."""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from graphopt.capture.arguments import flatten_call
from graphopt.capture.checkpoints import without_regions
from graphopt.capture.export import kept_as_stored
from graphopt.capture.structure import take_apart
from graphopt.driver import Compilation
from graphopt.inspect.simulate import SeededDraws, Simulation, Values
from graphopt.ir import Input, InputKind, Level, OutputKind, ParameterLayout, Program
from graphopt.plan import Plan

Outcome = dict[str, list[torch.Tensor]]  # by role; one value a rank, or the one whole gradient


@dataclass(frozen=True)
class Workload:
    """A model, and a call of it on every rank of a mesh.

    names: of the batch tensors; seeded: which outputs a gradient arrives at; dtype: of the computation, None for the
    model's own.
    """

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    mesh: Mapping[str, int]
    layouts: Mapping[str, ParameterLayout]
    names: list[str]
    seeded: tuple[bool, ...]
    dtype: torch.dtype | None

    @classmethod
    def of(
        cls, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], plan: Plan, compilation: Compilation
    ) -> "Workload":
        """The call that was compiled under a resolved plan, of a copy of the model."""
        return cls(
            model=copy.deepcopy(model),
            args=args,
            kwargs=kwargs,
            mesh=dict(plan.mesh),
            layouts=compilation.layouts,
            names=compilation.captured.names,
            seeded=compilation.seeded,
            dtype=plan.precision.compute_dtype if plan.precision is not None else None,
        )

    @property
    def ranks(self) -> int:
        return math.prod(self.mesh.values())

    @property
    def epsilon(self) -> float:
        """Of the dtype in which parameters compute."""
        dtypes = [p.dtype for p in self.model.parameters() if p.is_floating_point()]
        return max((torch.finfo(dtype).eps for dtype in ([self.dtype] if self.dtype else dtypes)), default=0.0)

    def batch(self, rank: int) -> list[torch.Tensor]:
        """The call's tensors with their elements rotated by `rank`, floating ones in the dtype of the computation."""
        tensors, _ = flatten_call(self.args, self.kwargs)
        rotated = [t.detach().reshape(-1).roll(rank).view(t.shape) for t in tensors]
        return [self.computed(t).requires_grad_(o.requires_grad) for t, o in zip(rotated, tensors, strict=True)]

    def computed(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy in the dtype of the computation."""
        return tensor.to(self.dtype) if self.dtype is not None and tensor.is_floating_point() else tensor.clone()

    def tangent(self, position: int, like: torch.Tensor) -> torch.Tensor:
        """The gradient that arrives at an output: one for a loss, else numbers that its position decides."""
        if like.dim() == 0:
            return torch.ones_like(like)
        generator = torch.Generator().manual_seed(position)
        return torch.randn(like.shape, generator=generator).to(like.dtype)


def eager_outcome(workload: Workload) -> Outcome:
    """The model itself, on each rank's batch in turn."""
    runs = [_eager_run(workload, workload.batch(rank), rank) for rank in range(workload.ranks)]
    found: Outcome = {}
    for run in runs:
        for role, value in (run.users | run.buffers).items():
            found.setdefault(role, []).append(value)
    return found | _means([run.gradients for run in runs])


def whole_batch_outcome(workload: Workload) -> Outcome:
    """The model itself, on the batches of all ranks as one; of its outputs the scalars, as means over the ranks."""
    parts = [workload.batch(rank) for rank in range(workload.ranks)]
    whole = [torch.cat(tensors) if tensors[0].dim() else tensors[0] for tensors in zip(*parts, strict=True)]
    run = _eager_run(workload, whole, 0)
    found: Outcome = {role: [value] for role, value in run.users.items() if value.dim() == 0}
    for role, value in run.buffers.items():
        found[role] = [value] * workload.ranks
    return found | _means([run.gradients])


@dataclass(frozen=True)
class _EagerRun:
    """Outputs and buffers by role, gradients by parameter."""

    users: dict[str, torch.Tensor]
    buffers: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor]


def _eager_run(workload: Workload, batch: list[torch.Tensor], rank: int) -> _EagerRun:
    model = copy.deepcopy(workload.model)
    if workload.dtype is not None:
        stored = kept_as_stored(model)
        for parameter in model.parameters():
            if id(parameter) not in stored:
                parameter.data = workload.computed(parameter.data)
    _, spec = flatten_call(workload.args, workload.kwargs)
    args, kwargs = spec.rebuild(batch)
    outputs: list[torch.Tensor] = []
    with SeededDraws(rank), without_regions():
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
    users = [values for role, values in zip(program.outputs, results, strict=True) if role.kind is OutputKind.USER]
    found: Outcome = {f"user {index}": [value.detach() for value in values] for index, values in enumerate(users)}
    found |= {f"buffer {name}": [buffer] * workload.ranks for name, buffer in workload.model.named_buffers()}
    for role, values in zip(program.outputs, results, strict=True):
        if role.kind is OutputKind.BUFFER:
            found[str(role)] = [value.detach() for value in values]
    if training:
        return found | _autograd_gradients(program, workload, inputs, results)
    local: list[dict[str, torch.Tensor]] = [{} for _ in range(workload.ranks)]
    for role, values in zip(program.outputs, results, strict=True):
        if role.kind is not OutputKind.GRADIENT or values[0] is None:
            continue
        if program.reduced:
            found[f"gradient {role.name}"] = [_whole(values, workload.layouts[role.name])]
        else:
            for rank, value in enumerate(values):
                local[rank][role.name] = value
    return found | _means(local)


def inputs_of(program: Program, workload: Workload, *, leaves: bool = False) -> list[Values]:
    """For each placeholder its value on each rank; leaves: parameters are leaves of autograd, one a rank."""
    parameters: dict[str, torch.Tensor] = dict(workload.model.named_parameters())
    if workload.ranks > 1:  # distributed parameters are contiguous
        parameters = {name: parameter.contiguous() for name, parameter in parameters.items()}
    buffers = dict(workload.model.named_buffers())
    batches = [dict(zip(workload.names, workload.batch(rank), strict=True)) for rank in range(workload.ranks)]
    given: list[Values] = []
    for role, node in zip(program.inputs, program.placeholders, strict=True):
        if role.kind in (InputKind.PARAMETER, InputKind.SHARD):
            value = parameters[role.name].detach()
            if role.kind is InputKind.SHARD:
                given.append(_shards(value, workload.layouts[role.name]))
                continue
            copies = [value.to(node.meta["val"].dtype, copy=True) for _ in range(workload.ranks)]
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
    values.update(Simulation(program, workload.mesh).run(inputs))
    return [[None] * workload.ranks if node is None else values[node] for node in program.results]


def _autograd_gradients(program: Program, workload: Workload, inputs: list[Values], results: list[Values]) -> Outcome:
    """Means of what autograd gives each rank's leaves; the ranks' graphs may be joined by collectives."""
    users = [v for role, v in zip(program.outputs, results, strict=True) if role.kind is OutputKind.USER]
    outputs: list[torch.Tensor] = []
    tangents: list[torch.Tensor] = []
    for position, (seeded, values) in enumerate(zip(workload.seeded, users, strict=True)):
        for value in values if seeded else ():
            outputs.append(value)
            tangents.append(workload.tangent(position, value))
    wanted = [
        (role.name, values)
        for role, values in zip(program.inputs, inputs, strict=True)
        if role.kind is InputKind.PARAMETER and role.requires_grad
    ]
    flat = [value for _, values in wanted for value in values]
    found = iter(torch.autograd.grad(outputs, flat, tangents, allow_unused=True))
    local: list[dict[str, torch.Tensor]] = [{} for _ in range(workload.ranks)]
    for name, values in wanted:
        for rank in range(len(values)):
            gradient = next(found)
            if gradient is not None:
                local[rank][name] = gradient
    return _means(local)


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


def _means(local: list[dict[str, torch.Tensor]]) -> Outcome:
    """Sums in the order of the ranks, divided by their number, at least in float32."""
    found: Outcome = {}
    for name in local[0]:
        first, *others = (_at_least_float32(each[name]) for each in local)
        total = first.clone()
        for other in others:
            total += other
        found[f"gradient {name}"] = [total / len(local)]
    return found


def _at_least_float32(value: torch.Tensor) -> torch.Tensor:
    return value.float() if value.dtype in (torch.bfloat16, torch.float16) else value


def _shards(value: torch.Tensor, layout: ParameterLayout) -> Values:
    """Each rank's rows of a parameter, padded to be equal."""
    rows = value.reshape(layout.rows, *layout.row_shape)
    padded = rows.new_zeros(layout.gathered_shape)
    padded[: layout.rows] = rows
    return list(padded.clone().chunk(layout.ranks))


def _whole(values: Values, layout: ParameterLayout) -> torch.Tensor:
    """The gradient from all ranks' shards; of a whole parameter, the first rank's, which all have."""
    if layout.is_whole:
        return values[0]  # type: ignore[no-any-return]
    return torch.cat(values)[: layout.rows].reshape(layout.shape)
