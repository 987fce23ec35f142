"""A call of a model -> one stage of its pipeline: capture -> passes, `cut` among them -> emit."""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from graphopt.capture.authored import authored_styles
from graphopt.capture.call import StepCall, loss_of
from graphopt.capture.export import Capture
from graphopt.capture.guards import AttributeGuard, ModelState
from graphopt.emit.executor import emit_functions
from graphopt.emit.split import split, split_backward
from graphopt.emit.stage import BACKWARD, FORWARD, INPUT_GRADIENTS, WEIGHT_GRADIENTS, Crossing, StageProgram
from graphopt.errors import PassError
from graphopt.ir import InputKind, OutputKind, Program
from graphopt.ir.collectives import collective_calls
from graphopt.lowering import capture_call, context_of, reported
from graphopt.passes.base import Pass
from graphopt.pipelined import CompiledStage
from graphopt.plan import Plan
from graphopt.planned import planned_pipeline
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


def compile_stage(site: Site, schedule: Schedule, call: StepCall, stage: int) -> CompiledStage:
    """Compile one stage for microbatches like those of `call`; in training, where autograd is on, with its backward."""
    started = time.perf_counter()
    model, plan, decided = site.model, site.plan, site.runtime.layouts
    attributes = AttributeGuard(ModelState(model), model.forward)
    pipeline = planned_pipeline(plan, site.registry, authored_styles(model), stage)
    layouts = choose_layouts(model, plan)
    captured = capture_call(model, call, plan)
    attributes.forget_changed()
    program = captured.program
    outputs = _outputs(program)
    loss = _loss_name(captured, outputs) if torch.is_grad_enabled() else None
    seeded = tuple(name == loss for name in outputs)
    shared_axes = site.runtime.collectives.shared_axes
    context = context_of(captured, plan, layouts, seeded, site.device, shared_axes, decided, reduce=False)
    forward_graph = program.module
    records = pipeline.run(program, context, verify=plan.verify)
    if decided is not None and layouts != decided:
        raise PassError(f"the pipeline {str(pipeline)!r} lays parameters out otherwise than they lie already")
    parts = _parts(program, schedule)
    title = f"stage {stage} of {type(model).__name__} under {plan}"
    emitted = emit_functions(parts, plan, captured.fake_mode, title=title, name=f"{type(model).__name__}_{stage}")
    return CompiledStage(
        program=StageProgram(
            parts=parts,
            functions=emitted.functions,
            received=[
                _crossing(role.name, role.requires_grad, node) for role, node in program.nodes_of(InputKind.RECEIVED)
            ],
            sent=[_crossing(role.name, role.requires_grad, node) for role, node in program.results_of(OutputKind.SENT)],
            runtime=site.runtime,
            rank=site.rank,
            ranks=plan.data_parallel_ranks,
            device=site.device,
        ),
        report=reported(program, forward_graph, records, pipeline, plan, shared_axes, emitted, started),
        attributes=attributes,
        names=captured.names,
        template=captured.output,
        outputs=outputs,
        loss=loss,
        collectives="\n".join(line for part in parts.values() for line in collective_calls(part)),
        layouts=layouts,
    )


def _outputs(program: Program) -> dict[str, TensorSpec]:
    """What the model returns, by name."""
    return {role.name: TensorSpec.of(node.meta["val"]) for role, node in program.results_of(OutputKind.USER) if node}


def _loss_name(captured: Capture, outputs: Mapping[str, TensorSpec]) -> str:
    """The name of the output that is the loss."""
    values = [node.meta["val"] for _, node in captured.program.results_of(OutputKind.USER) if node is not None]
    loss = loss_of(captured.output.build(values))
    return next(name for name, value in zip(outputs, values, strict=True) if value is loss)


def _parts(program: Program, schedule: Schedule) -> dict[str, Program]:
    """The programs of forward and of backward, whole or in two, as the schedule wants it."""
    halves = split(program)
    if halves.backward is None:
        return {FORWARD: halves.forward}
    if not schedule.splits_backward:
        return {FORWARD: halves.forward, BACKWARD: halves.backward}
    first, second = split_backward(halves.backward)
    return {FORWARD: halves.forward, BACKWARD: halves.backward, INPUT_GRADIENTS: first, WEIGHT_GRADIENTS: second}


def _crossing(name: str, has_gradient: bool, node: torch.fx.Node | None) -> Crossing:
    assert node is not None
    return Crossing(name, TensorSpec.of(node.meta["val"]), has_gradient)
