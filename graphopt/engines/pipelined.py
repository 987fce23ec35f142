"""A model cut into stages: its steps, in which the ranks of `pp` each run theirs by a schedule."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from graphopt._torch import compiled_call
from graphopt.capture.call import Loss, StepCall
from graphopt.capture.guards import CallKey, ModelState
from graphopt.cost.pipeline_memory import pipeline_memory
from graphopt.emit.stage import Microbatch, StageRun
from graphopt.engines.compiled_stage import CompiledStage, Specialization, StageFacts, fitting
from graphopt.engines.engine import Engine
from graphopt.engines.microbatches import Part, joined, microbatches
from graphopt.engines.owners import Owners
from graphopt.engines.whole import Whole
from graphopt.errors import GraphoptError
from graphopt.ir import ParameterLayout
from graphopt.plan import Plan
from graphopt.report import Report
from graphopt.runtime.agreement import Statement, agree, exchanged, failing_together
from graphopt.runtime.clipping import clip_grad_norm_
from graphopt.runtime.execute import run
from graphopt.runtime.parameters import gradient_for
from graphopt.runtime.peers import Peers
from graphopt.runtime.reduction import reduce_gradients
from graphopt.runtime.state import Runtime
from graphopt.runtime.tied import sum_over_stages
from graphopt.schedules import Schedule, StageTimes, forwards, steps


@dataclass
class Progress:
    """A step, done: by microbatch its part of the batch and what it was compiled to; by stage its run."""

    parts: list[Part]
    compiled: list[Specialization]
    runs: Mapping[int, StageRun]


CompileStages = Callable[[StepCall, Sequence[int]], Mapping[int, CompiledStage]]
Settle = Callable[[Mapping[str, ParameterLayout]], None]
Search = Callable[[Sequence[StageTimes]], Schedule]


class PipelinedEngine:
    """The steps of a model that is cut into stages. A call of the model itself is an error: no rank has all of it.

    mesh: of all axes. schedule: of a step. compile_stages: compiles stages for a call. settle: has the parameters lie
    as the first compilation took them to. peers: the ranks of the pipeline. search: gives a schedule of the same stages
    on the same ranks, in the place of the first, once it is known how long they take.
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
        search: Search | None = None,
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
        self._search = search
        self._state = ModelState(model)
        self._owners = Owners(runtime, schedule.rank_of_stage, self._rank, self._group)
        self._whole = Whole(model, runtime, functools.partial(self._owners.gathered, model))
        self._known: dict[tuple[CallKey, tuple[torch.Size, ...]], Specialization] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._whole.is_open or torch.compiler.is_exporting():
            return self._whole.call(*args, **kwargs)
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
            progress = self._go_through(StepCall.of(batch, target, self.loss), trains=True)
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
            progress = self._go_through(StepCall.of(batch, target, self.loss), trains=False)
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
            {stage: compiled.program.by_work for stage, compiled in first.stages.items()},
            self.plan.mesh,
            wanted=first.any_stage.wanted,
            shared_axes=self.runtime.collectives.shared_axes,
            batch_bytes=sum(tensor.nbytes for part in parts for tensor in part.tensors),
        )
        return dataclasses.replace(report, pipeline_memory=step)

    def no_sync(self) -> contextlib.AbstractContextManager[None]:
        raise GraphoptError("a step of a pipeline reduces gradients once; say pipeline.microbatches for more of them")

    def gathered(self) -> contextlib.AbstractContextManager[None]:
        """Parameters of all stages whole and plain on every rank, calls uncompiled, until the context ends."""
        return self._whole.opened()

    def clip_grad_norm_(self, max_norm: float, norm_type: float, error_if_nonfinite: bool) -> torch.Tensor:
        device = self.runtime.collectives.device
        return clip_grad_norm_(
            self.model,
            max_norm,
            norm_type,
            error_if_nonfinite,
            self._owners.is_own,
            _world(),
            device,
        )

    def _go_through(self, call: StepCall, *, trains: bool) -> Progress:
        self.runtime.require_values()
        parts, compiled = self._compiled_parts(call)
        schedule = self.schedule if trains else forwards(self.schedule)
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
        owners = fitting(exchanged({stage: StageFacts.of(compiled) for stage, compiled in stages.items()}, _world()))
        if self.runtime.layouts is None:
            self._settle(layouts)
        if self._search is not None and next(iter(stages.values())).loss is not None:
            self._reschedule(self._search, stages)
        return Specialization(stages, owners)

    def _reschedule(self, search: Search, stages: Mapping[int, CompiledStage]) -> None:
        """Once, for the first microbatches that are trained on: all ranks find the same from the same times."""
        times: dict[int, StageTimes] = {}
        for ours in exchanged({stage: compiled.times for stage, compiled in stages.items()}, _world()):
            times.update(ours)
        self.schedule = search([times[stage] for stage in range(self.schedule.stages)])
        agree(Statement({"schedule": self.schedule.to_text()}), dist.group.WORLD)
        self._search = None

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


def _seed(stage: CompiledStage, part: Part, device: torch.device) -> dict[str, torch.Tensor]:
    """The gradient that arrives at the loss of a microbatch: its share of the mean."""
    if stage.loss is None:
        return {}
    return {stage.loss: torch.full((), part.share, dtype=stage.outputs[stage.loss].dtype, device=device)}
