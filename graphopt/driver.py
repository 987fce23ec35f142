"""`graphopt.compile`: capture -> passes -> lower -> install."""

import functools
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from graphopt._torch import compiled_call, install_compiled_call
from graphopt.capture.arguments import flatten_call, tensor_names
from graphopt.capture.authored import authored_styles
from graphopt.capture.export import Capture, capture
from graphopt.capture.guards import AttributeGuard, ModelState, ShapeGuard
from graphopt.capture.surroundings import Surroundings
from graphopt.cost.communication import communication
from graphopt.cost.device import hardware_of
from graphopt.cost.memory import memory
from graphopt.emit.bridge import Executable
from graphopt.emit.executor import emit_functions
from graphopt.emit.module import EmittedFunction
from graphopt.emit.split import Halves, split
from graphopt.engine import Engine, Specialization
from graphopt.errors import GraphoptError, PassError, PlanError
from graphopt.ir import Level, OutputKind, ParameterLayout, Program
from graphopt.ir.collectives import collective_calls
from graphopt.passes import REGISTRY
from graphopt.passes.base import Pass, PassContext
from graphopt.passes.pipeline import Observer, PassRecord, Pipeline
from graphopt.plan import Offload, Plan, Remat
from graphopt.report import Report
from graphopt.runtime.agreement import Statement, agree
from graphopt.runtime.collectives import Collectives
from graphopt.runtime.copies import Copies
from graphopt.runtime.mesh import device_mesh, world_size
from graphopt.runtime.parameters import accept_whole_state, choose_layouts, lay_out, move_parameters, replicate, slots
from graphopt.runtime.state import Runtime

_SPLIT_AXES = {"sp": "heads", "cp": "sequence", "ep": "experts", "tp": "weights"}  # along what
Layouts = dict[str, ParameterLayout]


def compile(
    model: nn.Module,
    plan: Plan | str | None = None,
    *,
    example_inputs: tuple[Any, ...] | dict[str, Any] | None = None,
    registry: Mapping[str, type[Pass]] = REGISTRY,
) -> nn.Module:
    """Rewrite `model` in place to run as `plan` says, and return it.

    plan: a `Plan`, its text (``"dp=4,zero=3"``), or None for data parallelism over the world.
    example_inputs: positional (tuple) or keyword (dict) arguments of a call to compile for at once; without them the
        first call is captured.
    registry: the passes that the plan's pipeline may name.
    Parameters become DTensors under their own names when there is more than one rank; every rank starts from the
    values of the first. Where the plan splits layers they stay whole until a call is compiled, for that decides along
    which dimensions they are split. Raises PlanError, CaptureError, or RankMismatchError on every rank if ranks differ.
    """
    if compiled_call(model) is not None:
        raise GraphoptError(f"this {type(model).__name__} is compiled already; compile a fresh one for another plan")
    resolved = as_plan(plan).resolve(world_size())
    planned_pipeline(resolved, registry)
    device = _device(model)
    moves_state = resolved.offload is not None and resolved.offload.state
    if moves_state and device.type not in ("cpu", "meta"):
        raise PlanError(f"offload.state is for parameters on the CPU, these are on {device}; say offload.state=false")
    mesh = device_mesh(resolved, device)
    agree(_statement(model, resolved), None if mesh is None else dist.group.WORLD)
    groups = {} if mesh is None else {axis: mesh.get_group(axis) for axis, size in resolved.mesh.items() if size > 1}
    if mesh is not None:
        replicate(model, mesh)
        accept_whole_state(model)
    collectives = Collectives(groups, device, share_memory=resolved.transport == "auto")
    runtime = Runtime(slots(model), collectives, Copies(device, _folder(resolved)))
    settle = functools.partial(_settle, model, resolved, runtime, mesh)
    if not resolved.model_axes:
        settle(choose_layouts(model, resolved))
    rank = 0 if mesh is None else mesh.get_local_rank(resolved.data_parallel_axis)
    specialize = functools.partial(_specialize, model, resolved, runtime, rank, device, registry)
    engine = Engine(model, resolved, runtime, mesh, specialize, settle)
    install_compiled_call(model, engine)
    generate = getattr(model, "generate", None)
    if callable(generate):
        model.generate = engine.gather_during(generate)  # type: ignore[assignment]
    if example_inputs is not None:
        engine.prepare(*as_call(example_inputs))
    return model


def _settle(model: nn.Module, plan: Plan, runtime: Runtime, mesh: DeviceMesh | None, layouts: Layouts) -> None:
    """Have the parameters lie over the ranks as `layouts` say, where the plan wants their bytes."""
    moves_state = plan.offload is not None and plan.offload.state
    in_place = plan.zero.stage in (1, 2) and not moves_state
    runtime.settle(layouts, {} if mesh is None else lay_out(model, layouts, mesh, in_place=in_place))
    if plan.offload is not None and moves_state:
        move_parameters(model, plan.offload, runtime.copies)


def _folder(plan: Plan) -> Path:
    """Where files of this machine go."""
    return Path(tempfile.gettempdir() if plan.offload is None or plan.offload.folder is None else plan.offload.folder)


def as_plan(plan: Plan | str | None) -> Plan:
    """The plan that the argument of `compile` stands for."""
    if plan is None:
        return Plan()
    return Plan.parse(plan) if isinstance(plan, str) else plan


def as_call(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments, from a tuple, a dict, or a pair of both."""
    if isinstance(example_inputs, dict):
        return (), example_inputs
    if isinstance(example_inputs, tuple) and len(example_inputs) == 2:
        positional, keyword = example_inputs
        if isinstance(positional, tuple) and isinstance(keyword, dict):
            return positional, keyword
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    raise GraphoptError(
        f"example inputs are a {type(example_inputs).__name__}; give a tuple of positional arguments, a dict of named "
        "ones, or a pair of both"
    )


def pipeline_text(plan: Plan, likely: Mapping[str, str] | None = None) -> str:
    """The textual pipeline that a resolved plan stands for.

    likely: patterns of modules -> how the model's author would split them.
    """
    if plan.passes is not None:
        return plan.passes
    ranks = plan.data_parallel_ranks
    steps = ["canonicalize"]
    if plan.batch_norm == "global" and ranks > 1:
        steps.append("synchronize_batch_norm")
    steps += [_split_text(plan, axis, likely or {}) for axis in plan.model_axes]
    is_chunked = bool(plan.model_axes) and plan.tensor.chunks > 1
    if is_chunked:
        steps.append(f"chunk{{chunks={plan.tensor.chunks}}}")
    steps.append("differentiate")
    if plan.precision is not None:
        steps.append("precision")
    steps.append("checkpoint")
    if plan.remat is not None:
        steps.append(_remat_text(plan.remat, plan.offload))
    offload = plan.offload
    if offload is not None and offload.activations and (plan.remat is None or plan.remat.budget is None):
        steps.append(f"offload{{{_place_text(offload)}}}")
    if is_chunked:
        steps.append("interleave")
    if ranks > 1:
        steps.append(_zero_text(plan))
    if ranks > 1 or plan.model_axes:
        steps.append(f"bucket{{bytes={plan.zero.bucket_bytes or 0}}}")
        steps.append(f"schedule{{prefetch={plan.zero.prefetch}}}")
    if offload is not None and offload.state:
        steps.append(f"offload_state{{{_place_text(offload)}}}")
    if offload is not None:
        steps.append("overlap")
    return ",".join(steps)


def planned_pipeline(
    plan: Plan, registry: Mapping[str, type[Pass]] = REGISTRY, likely: Mapping[str, str] | None = None
) -> Pipeline:
    """The passes of a resolved plan; likely: as in `pipeline_text`.

    Raises PassError if they cannot run, or do not lead to the step it asks for.
    """
    pipeline = Pipeline.parse(pipeline_text(plan, likely), registry)
    if pipeline.check(Level.FORWARD) is not Level.STEP:
        raise PassError(f"the pipeline {str(pipeline)!r} leaves a program without gradients; add differentiate to it")
    names = {step.name for step in pipeline.passes}
    if plan.precision is not None and "precision" not in names:
        raise PassError(
            f"the pipeline {str(pipeline)!r} leaves parameters as they are stored, where the plan computes in "
            f"{plan.precision.compute}; add precision behind differentiate"
        )
    if plan.data_parallel_ranks > 1 and "zero" not in names:
        raise PassError(f"the pipeline {str(pipeline)!r} leaves each rank its own gradients; add zero to it")
    if plan.model_axes and "split" not in names:
        axis = plan.model_axes[0]
        raise PassError(f"the pipeline {str(pipeline)!r} splits nothing over {axis}; add split{{axis={axis}}} to it")
    return pipeline


def _place_text(offload: Offload) -> str:
    return f"place={offload.place},least_bytes={offload.least_bytes}"


def _remat_text(remat: Remat, offload: Offload | None) -> str:
    if remat.budget is None:
        options = [f"policy={remat.policy}"]
    else:
        name = "bytes" if isinstance(remat.budget, int) else "share"
        options = ["policy=budget", f"{name}={remat.budget}"]
        options += [_place_text(offload)] if offload is not None and offload.activations else []
    options += [
        f"{name}={'|'.join(kept)}" for name, kept in (("keep", remat.keep), ("keep_ops", remat.keep_ops)) if kept
    ]
    return f"rematerialize{{{','.join(options)}}}"


def _split_text(plan: Plan, axis: str, likely: Mapping[str, str]) -> str:
    options = [f"axis={axis}"]
    if _SPLIT_AXES[axis] != "weights":
        options.append(f"along={_SPLIT_AXES[axis]}")
        if _SPLIT_AXES[axis] == "experts" and plan.dispatch.capacity is not None:
            options.append(f"capacity={plan.dispatch.capacity}")
    else:
        options += ["sequence=true"] if plan.tensor.sequence else []
        options += _styles_text(plan.tensor.patterns, "")
        options += _styles_text(likely, "likely_") if plan.tensor.use_model_plan else []
    options += [] if plan.tensor.gather_outputs else ["gather_outputs=false"]
    return f"split{{{','.join(options)}}}"


def _styles_text(patterns: Mapping[str, str], prefix: str) -> list[str]:
    styles: dict[str, list[str]] = {}
    for pattern, style in patterns.items():
        styles.setdefault(style, []).append(pattern)
    return [f"{prefix}{style}={'|'.join(found)}" for style, found in styles.items()]


def _zero_text(plan: Plan) -> str:
    kept = plan.zero.keep_gathered
    patterns = "*" if kept is True else "|".join(kept or ())
    return f"zero{{stage={plan.zero.stage}" + (f",keep={patterns}" if patterns else "") + "}"


@dataclass
class Compilation:
    """One call of a model, compiled: the program, its halves and the report; nothing of it needs a process group.

    layouts: how the program takes parameters to lie over the ranks.
    """

    captured: Capture
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
    shared_axes: frozenset[str] = frozenset(),
    observer: Observer | None = None,
    registry: Mapping[str, type[Pass]] = REGISTRY,
) -> Compilation:
    """Compile one call of `model` under a resolved plan; the model is not touched, no process group is needed.

    decided: how the parameters lie already; by default that is decided here.
    layouts: where it can be seen, after each pass, how the program takes parameters to lie; empty.
    seeded: for each user output, whether a gradient arrives there; by default the scalar ones (a loss), or all.
    shared_axes: mesh axes whose ranks exchange through shared memory, which decides what buffers they need.
    observer: called after capture and after each pass with a record and the program.
    registry: the passes that the plan's pipeline may name.
    """
    started = time.perf_counter()
    pipeline = planned_pipeline(plan, registry, authored_styles(model))
    layouts = {} if layouts is None else layouts
    layouts.update(choose_layouts(model, plan))
    captured = _capture(model, args, kwargs, plan)
    program = captured.program
    if observer is not None:
        observer(PassRecord.of_capture(program, time.perf_counter() - started), program)
    if seeded is None:
        seeded = _likely_seeded(program)
    context = _context(captured, plan, layouts, seeded, _device(model), shared_axes, decided)
    forward_graph = program.module
    records = pipeline.run(program, context, verify=plan.verify, observer=observer)
    seeded, missed = _reached(program, seeded)
    if missed:
        return lower(
            model,
            args,
            kwargs,
            plan,
            decided=decided,
            layouts=layouts,
            seeded=missed,
            shared_axes=shared_axes,
            observer=observer,
            registry=registry,
        )
    if decided is not None and layouts != decided:
        raise PassError(f"the pipeline {str(pipeline)!r} lays parameters out otherwise than they lie already")
    halves = split(program)
    parts = {"forward": halves.forward} | ({"backward": halves.backward} if halves.backward else {})
    emitted = emit_functions(
        parts, plan, captured.fake_mode, title=f"{type(model).__name__} under {plan}", name=type(model).__name__
    )
    report = Report(
        forward_graph=forward_graph,
        step_graph=program.module,
        passes=records,
        pipeline=str(pipeline),
        communication=communication(program, plan.mesh),
        memory=memory(program, plan.mesh, shared_axes),
        compile_seconds=time.perf_counter() - started,
        source=emitted.source,
        source_path=emitted.path,
        notes=emitted.notes,
    )
    return Compilation(captured, halves, seeded, layouts, shared_axes, report, emitted.functions)


def _capture(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], plan: Plan) -> Capture:
    tensors, spec = flatten_call(args, kwargs)
    return capture(
        model,
        tensors,
        spec,
        tensor_names(model.forward, args, kwargs),
        compute_dtype=plan.precision.compute_dtype if plan.precision is not None else None,
        contiguous=any(ranks > 1 for ranks in plan.mesh.values()),
        dynamic=plan.dynamic_dims_for if plan.dynamic else None,
    )


def _context(
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
    )


def _device(model: nn.Module) -> torch.device:
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


def _reached(program: Program, seeded: tuple[bool, ...]) -> tuple[tuple[bool, ...], tuple[bool, ...] | None]:
    """Which of the seeded outputs lead back to a parameter; and, if none does, those outputs that would."""
    users = [role.requires_grad for role, _ in program.results_of(OutputKind.USER)]
    reached = tuple(flag and requires for flag, requires in zip(seeded, users, strict=True))
    return reached, tuple(users) if any(seeded) and not any(reached) and any(users) else None


def _unreduced(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    plan: Plan,
    compilation: Compilation,
    registry: Mapping[str, type[Pass]],
) -> EmittedFunction:
    """The backward half of a compilation without its reductions; it reads the same saved values."""
    captured = _capture(model, args, kwargs, plan)
    program = captured.program
    layouts, shared_axes = choose_layouts(model, plan), compilation.shared_axes
    seeded, decided = compilation.seeded, compilation.layouts
    context = _context(captured, plan, layouts, seeded, _device(model), shared_axes, decided, reduce=False)
    Pipeline.parse(compilation.report.pipeline, registry).run(program, context, verify=plan.verify)
    backward = split(program).backward
    assert backward is not None and compilation.halves.backward is not None
    assert backward.inputs == compilation.halves.backward.inputs
    emitted = emit_functions(
        {"backward": backward}, plan, captured.fake_mode, title="unreduced gradients", name="unreduced"
    )
    return emitted.functions["backward"]


def _statement(model: nn.Module, plan: Plan) -> Statement:
    """What all ranks must have in common before the first of them is sharded."""
    described = [f"{name}: {p.dtype} {tuple(p.shape)} {p.requires_grad}" for name, p in model.named_parameters()]
    described += [f"{name}: {b.dtype} {tuple(b.shape)}" for name, b in model.named_buffers()]
    return Statement(
        {
            "plan": str(plan),
            "model": f"{type(model).__name__} of {len(described)} tensors",
            "tensors": "\n".join(described),
        }
    )


def _specialize(
    model: nn.Module,
    plan: Plan,
    runtime: Runtime,
    rank: int,
    device: torch.device,
    registry: Mapping[str, type[Pass]],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    seeded: tuple[bool, ...] | None,
) -> Specialization:
    """Compile one call and bind it to this rank's runtime."""
    attributes = AttributeGuard(ModelState(model), model.forward)
    surroundings = Surroundings.now(device.type)
    shared_axes = runtime.collectives.shared_axes
    compilation = lower(
        model,
        args,
        kwargs,
        plan,
        decided=runtime.layouts,
        seeded=seeded,
        shared_axes=shared_axes,
        registry=registry,
    )
    captured = compilation.captured
    attributes.forget_changed()
    shapes = ShapeGuard(captured)

    def unreduced() -> EmittedFunction:
        with surroundings.restored():
            return _unreduced(model, args, kwargs, plan, compilation, registry)

    executable = Executable(
        halves=compilation.halves,
        forward=compilation.functions["forward"],
        backward=compilation.functions.get("backward"),
        unreduced=functools.cache(unreduced),
        runtime=runtime,
        batch_names=captured.names,
        seeded=compilation.seeded,
        rank=rank,
        ranks=plan.data_parallel_ranks,
        device=device,
    )
    halves = (compilation.halves.forward, compilation.halves.backward)
    calls = "\n".join(call for half in halves if half is not None for call in collective_calls(half))
    return Specialization(
        executable, compilation.report, attributes, shapes, surroundings, captured.output, calls, compilation.layouts
    )
