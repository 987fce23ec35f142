"""A call of a model -> stages of its pipeline: capture -> passes, `cut` among them -> emit."""

import dataclasses
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx, nn

from graphopt.capture.authored import authored_styles
from graphopt.capture.call import StepCall, loss_of
from graphopt.capture.export import Capture
from graphopt.capture.guards import AttributeGuard, ModelState
from graphopt.cost.stage_times import stage_times
from graphopt.emit.executor import emit_functions
from graphopt.emit.split import split, split_backward
from graphopt.emit.stage import BACKWARD, FORWARD, INPUT_GRADIENTS, WEIGHT_GRADIENTS, Crossing, StageProgram
from graphopt.engines.compiled_stage import CompiledStage
from graphopt.errors import PassError
from graphopt.ir import Input, InputKind, Output, OutputKind, Program
from graphopt.ir.collectives import collective_calls
from graphopt.ir.snapshot import Snapshot
from graphopt.lowering.call import capture_call, context_of, reported
from graphopt.lowering.passes import kernels_of, planned_pipeline
from graphopt.passes.base import Pass
from graphopt.plan import Plan
from graphopt.plan.sections import SEARCH
from graphopt.runtime.messages import TensorSpec
from graphopt.runtime.parameters import choose_layouts
from graphopt.runtime.state import Runtime
from graphopt.schedules import Schedule


@dataclass(frozen=True)
class Site:
    """A model and where it is compiled. rank: the place along the data-parallel axis of the resolved plan."""

    model: nn.Module
    plan: Plan
    runtime: Runtime
    rank: int
    device: torch.device
    registry: Mapping[str, type[Pass]]


def compile_stages(site: Site, schedule: Schedule, call: StepCall, stages: Sequence[int]) -> dict[int, CompiledStage]:
    """Compile stages for microbatches like `call`; in training, where autograd is on, with their backward.

    The model is captured once, on whatever device it is: of other stages nothing is ever computed or allocated.
    """
    attributes = AttributeGuard(ModelState(site.model), site.model.forward)
    captured = capture_call(site.model, call, site.plan)
    attributes.forget_changed()
    outputs = _outputs(captured.program)
    loss = _loss_name(captured, outputs) if torch.is_grad_enabled() else None
    shared = _Shared(captured, Snapshot(captured.program), outputs, loss)
    return {stage: _compile_stage(site, schedule, shared, attributes, stage) for stage in stages}


@dataclass(frozen=True)
class _Shared:
    """What all stages are made from. loss: the name, among the outputs, of that at which the gradient arrives."""

    captured: Capture
    before: Snapshot
    outputs: Mapping[str, TensorSpec]
    loss: str | None


def _compile_stage(
    site: Site, schedule: Schedule, shared: _Shared, attributes: AttributeGuard, stage: int
) -> CompiledStage:
    started = time.perf_counter()
    model, plan, decided = site.model, site.plan, site.runtime.layouts
    pipeline = planned_pipeline(plan, site.registry, authored_styles(model), stage)
    layouts = choose_layouts(model, plan)
    captured = dataclasses.replace(shared.captured, program=shared.before.restored())
    program = captured.program
    seeded = tuple(name == shared.loss for name in shared.outputs)
    shared_axes = site.runtime.collectives.shared_axes
    context = context_of(captured, plan, layouts, seeded, site.device, shared_axes, decided, reduce=False)
    forward_graph = program.module
    records = pipeline.run(program, context, verify=plan.verify)
    if decided is not None and layouts != decided:
        raise PassError(f"the pipeline {str(pipeline)!r} lays parameters out otherwise than they lie already")
    parts = _parts(program, splits_backward=schedule.splits_backward or plan.pipeline.schedule == SEARCH)
    title = f"stage {stage} of {type(model).__name__} under {plan}"
    name = f"{type(model).__name__}_{stage}"
    emitted = emit_functions(parts, plan, captured.fake_mode, title=title, name=name, kernels=kernels_of(plan))
    made = StageProgram(
        parts=parts,
        functions=emitted.functions,
        received=_crossings(program.nodes_of(InputKind.RECEIVED)),
        sent=_crossings(program.results_of(OutputKind.SENT)),
        runtime=site.runtime,
        rank=site.rank,
        ranks=plan.data_parallel_ranks,
        device=site.device,
    )
    return CompiledStage(
        program=made,
        report=reported(program, forward_graph, records, pipeline, plan, shared_axes, emitted, started),
        attributes=attributes,
        names=captured.names,
        template=captured.output,
        outputs=shared.outputs,
        loss=shared.loss,
        collectives="\n".join(line for part in parts.values() for line in collective_calls(part)),
        layouts=layouts,
        times=stage_times(made.by_work, plan.mesh, context.hardware),
    )


def _outputs(program: Program) -> dict[str, TensorSpec]:
    """What the model returns, by name."""
    return {role.name: TensorSpec.of(node.meta["val"]) for role, node in program.results_of(OutputKind.USER) if node}


def _loss_name(captured: Capture, outputs: Mapping[str, TensorSpec]) -> str:
    """The name of the output that is the loss."""
    values = [node.meta["val"] for _, node in captured.program.results_of(OutputKind.USER) if node is not None]
    loss = loss_of(captured.output.build(values))
    return next(name for name, value in zip(outputs, values, strict=True) if value is loss)


def _parts(program: Program, *, splits_backward: bool) -> dict[str, Program]:
    """The programs of forward and of backward, whole, and in two where the schedule may want that."""
    halves = split(program)
    if halves.backward is None:
        return {FORWARD: halves.forward}
    if not splits_backward:
        return {FORWARD: halves.forward, BACKWARD: halves.backward}
    first, second = split_backward(halves.backward)
    return {FORWARD: halves.forward, BACKWARD: halves.backward, INPUT_GRADIENTS: first, WEIGHT_GRADIENTS: second}


def _crossings(values: Iterable[tuple[Input | Output, fx.Node | None]]) -> list[Crossing]:
    return [
        Crossing(role.name, TensorSpec.of(node.meta["val"]), role.requires_grad)
        for role, node in values
        if node is not None
    ]
