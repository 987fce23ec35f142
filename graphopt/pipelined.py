"""A model cut into stages: its steps, in which the ranks of `pp` each run theirs by a schedule."""

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from graphopt._torch import compiled_call, reparametrized
from graphopt.capture.call import Loss, StepCall
from graphopt.capture.guards import AttributeGuard, CallKey, ModelState
from graphopt.capture.structure import Template
from graphopt.cost.pipeline_memory import pipeline_memory
from graphopt.emit.stage import (
    BACKWARD,
    FORWARD,
    INPUT_GRADIENTS,
    WEIGHT_GRADIENTS,
    Microbatch,
    StageProgram,
    StageRun,
)
from graphopt.engine import Engine, call_uncompiled
from graphopt.errors import GraphoptError, RankMismatchError
from graphopt.ir import ParameterLayout, Program
from graphopt.microbatches import Part, joined, microbatches
from graphopt.plan import Plan
from graphopt.report import Report
from graphopt.runtime.agreement import Statement, agree, exchanged, failing_together
from graphopt.runtime.clipping import clip_grad_norm_
from graphopt.runtime.execute import run
from graphopt.runtime.messages import TensorSpec
from graphopt.runtime.parameters import gradient_for, whole_parameter, whole_parameters
from graphopt.runtime.peers import Peers
from graphopt.runtime.reduction import reduce_gradients
from graphopt.runtime.state import Runtime
from graphopt.runtime.tied import sum_over_stages
from graphopt.schedules import Schedule, Work, forwards, steps


@dataclass
class CompiledStage:
    """One stage, for calls of one key.

    names: of the call's tensors. template: rebuilds what the model returns of `outputs`, all of them, by name. loss:
    the name of that which is the loss, in training. collectives: what it exchanges, a line for each call, in order.
    """

    program: StageProgram
    report: Report
    attributes: AttributeGuard
    names: list[str]
    template: Template
    outputs: Mapping[str, TensorSpec]
    loss: str | None
    collectives: str
    layouts: Mapping[str, ParameterLayout]

    @property
    def wanted(self) -> Collection[str]:
        """Outputs to keep: of a step in training nobody sees any but the loss."""
        return self.outputs if self.loss is None else (self.loss,)


@dataclass
class Specialization:
    """The stages of this rank for calls of one key; owners: the stage that makes each output, by its name."""

    stages: Mapping[int, CompiledStage]
    owners: Mapping[str, int]

    @property
    def any_stage(self) -> CompiledStage:
        """From which can be read what all stages have in common."""
        return next(iter(self.stages.values()))


@dataclass
class Progress:
    """A step, done: by microbatch its part of the batch and what it was compiled to; by stage its run."""

    parts: list[Part]
    compiled: list[Specialization]
    runs: Mapping[int, StageRun]


CompileStages = Callable[[StepCall, Sequence[int]], Mapping[int, CompiledStage]]
Settle = Callable[[Mapping[str, ParameterLayout]], None]


class PipelinedEngine:
    """The steps of a model that is cut into stages. A call of the model itself is an error: no rank has all of it.

    mesh: of all axes. schedule: of a step. compile_stages: compiles stages for a call. settle: has the parameters lie
    as the first compilation took them to. peers: the ranks of the pipeline.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        runtime: Runtime,
        mesh: DeviceMesh,
        schedule: Schedule,
        compile_stages: CompileStages,
        settle: Settle,
        peers: Peers,
        loss: Loss | None,
    ) -> None:
        self.model = model
        self.plan = plan
        self.runtime = runtime
        self.schedule = schedule
        self.loss = loss
        self._last: tuple[list[Part], list[Specialization]] | None = None
        self._group = mesh.get_group(plan.pipeline_axis)
        self._rank = mesh.get_local_rank(plan.pipeline_axis)
        self._compile_stages = compile_stages
        self._settle = settle
        self._peers = peers
        self._state = ModelState(model)
        self._eager = False
        self._known: dict[tuple[CallKey, tuple[torch.Size, ...]], Specialization] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._eager or torch.compiler.is_exporting():
            return call_uncompiled(self.model, *args, **kwargs)
        raise GraphoptError(
            f"this {type(self.model).__name__} is cut into {self.schedule.stages} stages, so no rank can call all of "
            "it; say model.train_step(batch) or model.eval_step(batch)"
        )

    def train_step(self, batch: Any, target: Any = None) -> torch.Tensor:
        """Forward and backward of a batch in microbatches; gradients are added to those that parameters have.

        All ranks of the pipeline give the same batch. Returns the mean loss, on each of them. Raises PlanError if the
        batch has fewer rows than there are microbatches, GraphoptError if the model returns no loss.
        """
        with torch.enable_grad():
            progress = self._go_through(StepCall.of(batch, target, self.loss), self.schedule)
        for name, gradient in self._gradients(progress).items():
            parameter = self.runtime.slots[name].get()
            ours = gradient_for(parameter, gradient, self.runtime.layout_of(name))
            parameter.grad = ours if parameter.grad is None else parameter.grad + ours
        loss = progress.compiled[0].any_stage.loss
        mean = self._joined(progress, loss, everywhere=True) if loss is not None else None
        assert mean is not None
        return mean

    def eval_step(self, batch: Any, target: Any = None) -> Any:
        """What the model returns for a batch, or its loss for a target, without gradients.

        It goes through the stages in microbatches, which are put together again. Where the plan says
        ``pipeline.outputs=last``, ranks that do not make an output have None in its place.
        """
        with torch.no_grad():
            progress = self._go_through(StepCall.of(batch, target, self.loss), forwards(self.schedule))
        everywhere = self.plan.pipeline.outputs == "all"
        compiled = progress.compiled[0].any_stage
        return compiled.template.build([self._joined(progress, name, everywhere) for name in compiled.outputs])

    def prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Compile for a step of such a batch now."""
        self._compiled_parts(StepCall.of((args, kwargs), None, self.loss))

    def last_report(self) -> Report:
        """Of the first stage on this rank, for the step that ran last, with the memory of all its microbatches."""
        if self._last is None:
            raise GraphoptError("nothing is compiled yet: run a step, or give example_inputs to graphopt.compile")
        parts, (first, *_) = self._last
        report, trains = first.any_stage.report, first.any_stage.loss is not None
        schedule = self.schedule if trains else forwards(self.schedule)
        step = pipeline_memory(
            schedule.rows[self._rank],
            {stage: _by_work(compiled.program) for stage, compiled in first.stages.items()},
            self.plan.mesh,
            wanted=first.any_stage.wanted,
            shared_axes=self.runtime.collectives.shared_axes,
            batch_bytes=sum(tensor.nbytes for part in parts for tensor in part.tensors),
        )
        return dataclasses.replace(report, pipeline_memory=step)

    def no_sync(self) -> contextlib.AbstractContextManager[None]:
        raise GraphoptError("a step of a pipeline reduces gradients once; say pipeline.microbatches for more of them")

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """Parameters of all stages whole and plain on every rank, calls uncompiled, until the context ends."""
        if self._eager:
            yield
            return
        self.runtime.require_values()
        whole = whole_parameters(self.model, whole_parameter if self.runtime.layouts is None else self._gathered)
        self._eager = True
        try:
            with reparametrized(self.model, whole):
                yield
        finally:
            self._eager = False

    def clip_grad_norm_(self, max_norm: float, norm_type: float, error_if_nonfinite: bool) -> torch.Tensor:
        device = self.runtime.collectives.device
        return clip_grad_norm_(
            self.model,
            max_norm,
            norm_type,
            error_if_nonfinite,
            lambda name: self._owner(name) == self._rank,
            _world(),
            device,
        )

    def _owner(self, name: str) -> int:
        """The first of the ranks along the pipeline that have a parameter."""
        return min(self.schedule.rank_of_stage[stage] for stage in self.runtime.layout_of(name).stages)

    def _gathered(self, name: str, parameter: nn.Parameter) -> torch.Tensor:
        """All of a parameter, from the ranks of its stages."""
        owner = self._owner(name)
        if owner == self._rank:
            value = whole_parameter(name, parameter).detach().contiguous()
        else:
            value = torch.empty(parameter.shape, dtype=parameter.dtype, device=self.runtime.collectives.device)
        if value.numel():
            dist.broadcast(value, dist.get_global_rank(self._group, owner), self._group)
        return value

    def _go_through(self, call: StepCall, schedule: Schedule) -> Progress:
        self.runtime.require_values()
        parts, compiled = self._compiled_parts(call)
        batches = [
            Microbatch(
                dict(zip(each.any_stage.names, part.tensors, strict=True)),
                _seed(each.any_stage, part, self.runtime.collectives.device),
            )
            for part, each in zip(parts, compiled, strict=True)
        ]
        own = schedule.stages_of(self._rank)
        wanted = compiled[0].any_stage.wanted
        runs = {stage: StageRun([each.stages[stage].program for each in compiled], batches, wanted) for stage in own}
        rows = steps(schedule)
        resident = self.runtime.resident
        run(rows[self._rank], runs, schedule.rank_of_stage, self._peers, self.runtime.collectives.alarm)
        resident.release() if self.plan.gathers_once_a_step else resident.invalidate()
        return Progress(parts, compiled, runs)

    def _compiled_parts(self, call: StepCall) -> tuple[list[Part], list[Specialization]]:
        """The microbatches of a call, and what each is compiled to."""
        if self.plan.precision is not None:
            dtype = self.plan.precision.compute_dtype
            call = call.with_tensors([t.to(dtype) if t.is_floating_point() else t for t in call.tensors])
        parts = microbatches(call.tensors, self.plan.microbatches)
        found: dict[tuple[torch.Size, ...], Specialization] = {}  # all but one or two of the same
        for part in parts:
            shapes = tuple(tensor.shape for tensor in part.tensors)
            if shapes not in found:
                found[shapes] = self._find(call.with_tensors(part.tensors))
        self._last = parts, [found[tuple(tensor.shape for tensor in part.tensors)] for part in parts]
        return self._last

    def _find(self, call: StepCall) -> Specialization:
        key = (self._state.key(call.spec, call.tensors), tuple(tensor.shape for tensor in call.tensors))
        known = self._known.get(key)
        if known is None or any(stage.attributes.broken() for stage in known.stages.values()):
            known = self._known[key] = self._compiled(call)
        return known

    def _compiled(self, call: StepCall) -> Specialization:
        """Compile this rank's stages, and make sure that all ranks go on together with stages that fit."""
        with failing_together(dist.group.WORLD):
            stages = self._compile_stages(call, self.schedule.stages_of(self._rank))
        layouts = next(iter(stages.values())).layouts
        agree(Statement({"layouts": "\n".join(map(str, layouts.values()))}), dist.group.WORLD)
        owners = _fitting(exchanged({stage: _facts(compiled) for stage, compiled in stages.items()}, _world()))
        if self.runtime.layouts is None:
            self._settle(layouts)
        return Specialization(stages, owners)

    def _gradients(self, progress: Progress) -> dict[str, torch.Tensor]:
        """Of this rank's parameters: means over the data-parallel ranks, shards of those that are sharded."""
        assert self.runtime.layouts is not None
        sums: dict[str, torch.Tensor] = {}
        for stage in sorted(progress.runs):
            for name, gradient in progress.runs[stage].gradients.take().items():
                sums[name] = sums[name] + gradient if name in sums else gradient
        slots, layouts = self.runtime.slots, self.runtime.layouts
        trained = {name: layout for name, layout in layouts.items() if slots[name].get().requires_grad}
        device = self.runtime.collectives.device
        sum_over_stages(sums, trained, self.schedule.rank_of_stage, self._rank, self._peers, device)
        if self.plan.data_parallel_ranks > 1:
            return reduce_gradients(sums, self.runtime.layouts, self.runtime.collectives)
        return {name: gradient.to(self.runtime.layout_of(name).dtype) for name, gradient in sums.items()}

    def _joined(self, progress: Progress, name: str, everywhere: bool) -> torch.Tensor | None:
        """An output of all microbatches, from the rank of the stage that makes it; there alone, or everywhere."""
        stage = progress.compiled[0].owners[name]
        owner = self.schedule.rank_of_stage[stage]
        specs = [each.any_stage.outputs[name] for each in progress.compiled]
        if owner == self._rank:
            values = [progress.runs[stage].outputs[index][name] for index in range(len(specs))]
        elif everywhere:
            values = [spec.empty(self.runtime.collectives.device) for spec in specs]
        else:
            return None
        whole = joined(values, progress.parts)
        if everywhere:
            dist.broadcast(whole, dist.get_global_rank(self._group, owner), self._group)
        return whole


def engine_of(model: nn.Module) -> Engine | PipelinedEngine:
    """The engine of a compiled model. Raises GraphoptError for any other."""
    engine = compiled_call(model)
    if not isinstance(engine, (Engine, PipelinedEngine)):
        raise GraphoptError(f"this {type(model).__name__} is not compiled; call graphopt.compile(model, plan) first")
    return engine


def _world() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None
    return group


def _by_work(stage: StageProgram) -> dict[Work, Program]:
    names = {
        Work.FORWARD: FORWARD,
        Work.BACKWARD: BACKWARD,
        Work.INPUT_GRADIENT: INPUT_GRADIENTS,
        Work.WEIGHT_GRADIENT: WEIGHT_GRADIENTS,
    }
    return {work: stage.parts[name] for work, name in names.items() if name in stage.parts}


def _seed(stage: CompiledStage, part: Part, device: torch.device) -> dict[str, torch.Tensor]:
    """The gradient that arrives at the loss of a microbatch: its share of the mean."""
    if stage.loss is None:
        return {}
    return {stage.loss: torch.full((), part.share, dtype=stage.outputs[stage.loss].dtype, device=device)}


@dataclass(frozen=True)
class _Facts:
    """What neighbours and twins of a stage must agree with."""

    received: list[str]
    sent: list[str]
    collectives: str
    outputs: list[str]


def _facts(stage: CompiledStage) -> _Facts:
    program = stage.program
    return _Facts(
        [str(each) for each in program.received],
        [str(each) for each in program.sent],
        stage.collectives,
        program.user_outputs,
    )


def _fitting(facts: Sequence[Mapping[int, _Facts]]) -> dict[str, int]:
    """The stage that makes each output. Raises RankMismatchError, on all ranks alike, if stages do not fit."""
    found: dict[int, tuple[int, _Facts]] = {}
    for rank, its in enumerate(facts):
        for stage, fact in its.items():
            first, known = found.setdefault(stage, (rank, fact))
            if fact != known:
                raise RankMismatchError(f"stage {stage} of rank {rank} is not that of rank {first}")
    for stage in sorted(found)[:-1]:
        sent, received = found[stage][1].sent, found[stage + 1][1].received
        if sent != received:
            raise RankMismatchError(f"stage {stage} sends {sent}, stage {stage + 1} expects {received}")
    return {name: stage for stage, (_, fact) in found.items() for name in fact.outputs}
