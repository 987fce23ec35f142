"""A call of a model -> its program, through the passes of a plan, as functions: capture -> passes -> emit."""

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from graphopt.capture.authored import authored_styles
from graphopt.capture.call import StepCall
from graphopt.capture.export import Capture, capture
from graphopt.cost.communication import communication
from graphopt.cost.device import hardware_of
from graphopt.cost.memory import memory
from graphopt.emit.executor import Emitted, emit_functions
from graphopt.emit.module import EmittedFunction
from graphopt.emit.split import Halves, split
from graphopt.errors import PassError
from graphopt.ir import OutputKind, ParameterLayout, Program
from graphopt.ir.snapshot import Snapshot
from graphopt.lowering.passes import kernels_of, planned_pipeline
from graphopt.passes import REGISTRY
from graphopt.passes.base import Pass, PassContext
from graphopt.passes.pipeline import Observer, PassRecord, Pipeline
from graphopt.plan import Plan
from graphopt.report import Report
from graphopt.runtime.parameters import choose_layouts
from graphopt.triton_kernels.choice import decided
from graphopt.triton_kernels.used import uses

Layouts = dict[str, ParameterLayout]


@dataclass
class Compilation:
    """One call of a model, compiled: the program, its halves and the report; nothing of it needs a process group.

    before: the program as it was captured. layouts: how the program takes parameters to lie over the ranks.
    """

    captured: Capture
    before: Snapshot
    halves: Halves
    seeded: tuple[bool, ...]
    layouts: Layouts
    shared_axes: frozenset[str]
    report: Report
    functions: dict[str, EmittedFunction]


def lower(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    plan: Plan,
    *,
    decided: Layouts | None = None,
    layouts: Layouts | None = None,
    seeded: tuple[bool, ...] | None = None,
    stage: int = 0,
    shared_axes: frozenset[str] = frozenset(),
    observer: Observer | None = None,
    registry: Mapping[str, type[Pass]] = REGISTRY,
) -> Compilation:
    """Compile one call of `model` under a resolved plan; the model is not touched, no process group is needed.

    decided: how the parameters lie already; by default that is decided here.
    layouts: where it can be seen, after each pass, how the program takes parameters to lie; empty.
    seeded: for each user output, whether a gradient arrives there; by default the scalar ones (a loss), or all.
    stage: which, if the plan cuts the model into several.
    shared_axes: mesh axes whose ranks exchange through shared memory, which decides what buffers they need.
    observer: called after capture and after each pass with a record and the program.
    registry: the passes that the plan's pipeline may name.
    """
    started = time.perf_counter()
    pipeline = planned_pipeline(plan, registry, authored_styles(model), stage)
    layouts = {} if layouts is None else layouts
    layouts.update(choose_layouts(model, plan))
    captured = capture_call(model, StepCall.plain(args, kwargs), plan)
    program = captured.program
    returned = [role.name for role, _ in program.results_of(OutputKind.USER)]
    before = Snapshot(program)
    if observer is not None:
        observer(PassRecord.of_capture(program, time.perf_counter() - started), program)
    if seeded is None:
        seeded = _likely_seeded(program)
    context = context_of(captured, plan, layouts, seeded, device_of(model), shared_axes, decided)
    forward_graph = program.module
    records = pipeline.run(program, context, verify=plan.verify, observer=observer)
    seeded, missed = _reached(program, returned, seeded)
    if missed:
        return lower(
            model,
            args,
            kwargs,
            plan,
            decided=decided,
            layouts=layouts,
            seeded=missed,
            stage=stage,
            shared_axes=shared_axes,
            observer=observer,
            registry=registry,
        )
    if decided is not None and layouts != decided:
        raise PassError(f"the pipeline {str(pipeline)!r} lays parameters out otherwise than they lie already")
    halves = split(program)
    parts = {"forward": halves.forward} | ({"backward": halves.backward} if halves.backward else {})
    emitted = emit_functions(
        parts,
        plan,
        captured.fake_mode,
        title=f"{type(model).__name__} under {plan}",
        name=type(model).__name__,
        kernels=kernels_of(plan),
    )
    report = reported(program, forward_graph, records, pipeline, plan, shared_axes, emitted, started)
    return Compilation(captured, before, halves, seeded, layouts, shared_axes, report, emitted.functions)


def reported(
    program: Program,
    forward_graph: fx.GraphModule,
    records: list[PassRecord],
    pipeline: Pipeline,
    plan: Plan,
    shared_axes: frozenset[str],
    emitted: Emitted,
    started: float,
) -> Report:
    """What was done since `started`, in seconds of `time.perf_counter`."""
    with decided(kernels_of(plan)):
        kernels = uses(program)
    return Report(
        forward_graph=forward_graph,
        step_graph=program.module,
        passes=records,
        pipeline=str(pipeline),
        communication=communication(program, plan.mesh),
        memory=memory(program, plan.mesh, shared_axes),
        compile_seconds=time.perf_counter() - started,
        source=emitted.source,
        source_path=emitted.path,
        kernels=kernels,
        notes=emitted.notes,
    )


def capture_call(model: nn.Module, call: StepCall, plan: Plan) -> Capture:
    return capture(
        model,
        call.tensors,
        call.spec,
        call.names(model.forward),
        apply=call.apply,
        compute_dtype=plan.precision.compute_dtype if plan.precision is not None else None,
        contiguous=any(ranks > 1 for ranks in plan.mesh.values()),
        dynamic=plan.dynamic_dims_for if plan.dynamic else None,
    )


def context_of(
    captured: Capture,
    plan: Plan,
    layouts: Layouts,
    seeded: tuple[bool, ...],
    device: torch.device,
    shared_axes: frozenset[str],
    decided: Layouts | None,
    *,
    reduce: bool = True,
) -> PassContext:
    return PassContext(
        fake_mode=captured.fake_mode,
        mesh=dict(plan.mesh),
        layouts=layouts,
        decided=decided,
        data_axis=plan.data_parallel_axis,
        gradient_outputs=_seeded_names(captured.program, seeded),
        reduce_dtype=plan.precision.reduce_dtype if plan.precision is not None else None,
        reduce_gradients=reduce,
        hardware=hardware_of(device, plan.hardware),
        shared_axes=shared_axes,
        kernels=kernels_of(plan),
    )


def device_of(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _likely_seeded(program: Program) -> tuple[bool, ...]:
    """A gradient is expected at scalar outputs (a loss) if there are any, else at every floating output."""
    values = [node.meta["val"] for _, node in program.results_of(OutputKind.USER) if node is not None]
    if not torch.is_grad_enabled():
        return (False,) * len(values)
    scalars = tuple(value.is_floating_point() and value.dim() == 0 for value in values)
    return scalars if any(scalars) else tuple(value.is_floating_point() for value in values)


def _seeded_names(program: Program, seeded: tuple[bool, ...]) -> frozenset[str]:
    users = [role.name for role, _ in program.results_of(OutputKind.USER)]
    return frozenset(name for name, flag in zip(users, seeded, strict=True) if flag)


def _reached(
    program: Program, returned: list[str], seeded: tuple[bool, ...]
) -> tuple[tuple[bool, ...], tuple[bool, ...] | None]:
    """Which of the seeded outputs lead back to a parameter; and, if none does, those outputs that would.

    returned: the model's outputs; those that other stages of a pipeline make are taken to be reached.
    """
    found = {role.name: role.requires_grad for role, _ in program.results_of(OutputKind.USER)}
    users = tuple(found.get(name, True) for name in returned)
    reached = tuple(flag and requires for flag, requires in zip(seeded, users, strict=True))
    return reached, users if any(seeded) and not any(reached) and any(users) else None


def unreduced_backward(
    model: nn.Module, plan: Plan, compilation: Compilation, registry: Mapping[str, type[Pass]]
) -> EmittedFunction:
    """The backward half of a compilation without its reductions; it reads the same saved values."""
    captured = dataclasses.replace(compilation.captured, program=compilation.before.restored())
    program = captured.program
    layouts, shared_axes = choose_layouts(model, plan), compilation.shared_axes
    seeded, decided = compilation.seeded, compilation.layouts
    context = context_of(captured, plan, layouts, seeded, device_of(model), shared_axes, decided, reduce=False)
    Pipeline.parse(compilation.report.pipeline, registry).run(program, context, verify=plan.verify)
    backward = split(program).backward
    assert backward is not None and compilation.halves.backward is not None
    assert backward.inputs == compilation.halves.backward.inputs
    emitted = emit_functions(
        {"backward": backward},
        plan,
        captured.fake_mode,
        title="unreduced gradients",
        name="unreduced",
        kernels=kernels_of(plan),
    )
    return emitted.functions["backward"]
