"""`graphopt.compile`: capture -> passes -> lower -> install."""

import functools
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from graphopt._torch import compiled_call, install_compiled_call
from graphopt.capture.call import Loss, as_call
from graphopt.capture.guards import AttributeGuard, ModelState, ShapeGuard
from graphopt.capture.surroundings import Surroundings
from graphopt.emit.bridge import Executable
from graphopt.emit.module import EmittedFunction
from graphopt.engines.engine import Engine, Specialization
from graphopt.engines.pipelined import PipelinedEngine
from graphopt.errors import GraphoptError, PlanError
from graphopt.ir.collectives import collective_calls
from graphopt.lowering.call import Layouts, lower, unreduced_backward
from graphopt.lowering.passes import planned_pipeline
from graphopt.lowering.schedule import planned_schedule
from graphopt.lowering.stages import Site, compile_stages
from graphopt.passes import REGISTRY
from graphopt.passes.base import Pass
from graphopt.plan import Plan
from graphopt.plan.sections import SEARCH
from graphopt.runtime.agreement import Statement, agree
from graphopt.runtime.collectives import Collectives
from graphopt.runtime.copies import Copies
from graphopt.runtime.initialize import compute_buffers
from graphopt.runtime.mesh import device_mesh, stage_mesh, world_size
from graphopt.runtime.parameters import accept_whole_state, choose_layouts, lay_out, move_parameters, replicate, slots
from graphopt.runtime.peers import peers_of
from graphopt.runtime.stage_parameters import leave_to_stages
from graphopt.runtime.state import Runtime
from graphopt.runtime.unloaded import home, leave_meta, note_loaded, persistent, without_values
from graphopt.schedules import Schedule


def compile(
    model: nn.Module,
    plan: Plan | str | None = None,
    *,
    example_inputs: tuple[Any, ...] | dict[str, Any] | None = None,
    loss: Loss | None = None,
    device: torch.device | str | None = None,
    registry: Mapping[str, type[Pass]] = REGISTRY,
) -> nn.Module:
    """Rewrite `model` in place to run as `plan` says, and return it.

    plan: a `Plan`, its text (``"dp=4,zero=3"``), or None for data parallelism over the world.
    example_inputs: positional (tuple) or keyword (dict) arguments of a call to compile for at once; without them the
        first call is captured.
    loss: (what the model returns, the target that `train_step` is given) -> a scalar, for a model without a loss.
    device: for a model on the meta device, where it shall be; by default where torch makes tensors. It gets no more
        bytes than lie on this rank, and values by `load_weights`, `init_weights` or `load_state_dict`. Buffers that are
        not persistent get theirs now, by their module's `reset_parameters` or, in Transformers, `_init_weights`.
    registry: the passes that the plan's pipeline may name.
    Parameters become DTensors under their own names when there is more than one rank; every rank starts from the
    values of the first. Where the plan splits layers they stay whole until a call is compiled, for that decides along
    which dimensions they are split, and likewise where it cuts stages. Raises PlanError, CaptureError, or
    RankMismatchError on every rank if ranks differ.

    Under every plan the model has `train_step(batch, target=None)`, which leaves gradients and returns the mean loss,
    and `eval_step(batch, target=None)`; under one with ``pp`` they take the place of calls.
    """
    if compiled_call(model) is not None:
        raise GraphoptError(f"this {type(model).__name__} is compiled already; compile a fresh one for another plan")
    resolved = as_plan(plan).resolve(world_size())
    planned_pipeline(resolved, registry)
    device = home(model, device)
    _require_host_state(resolved, device)
    mesh = device_mesh(resolved, device)
    agree(_statement(model, resolved), None if mesh is None else dist.group.WORLD)
    site = _site(model, resolved, mesh, device, registry)
    engine: Engine | PipelinedEngine
    if mesh is not None and resolved.pipeline_ranks > 1:
        engine = _pipelined_engine(site, mesh, loss)
    else:
        engine = _engine(site, mesh, loss)
    install_compiled_call(model, engine)
    model.train_step, model.eval_step = engine.train_step, engine.eval_step  # type: ignore[assignment]
    if example_inputs is not None:
        engine.prepare(*as_call(example_inputs))
    return model


def _site(
    model: nn.Module, plan: Plan, mesh: DeviceMesh | None, device: torch.device, registry: Mapping[str, type[Pass]]
) -> Site:
    """A model whose tensors are on their device, or on none until they get values; alike on all ranks."""
    replicas = None if mesh is None else stage_mesh(mesh, plan)
    unloaded = without_values(model)
    if unloaded:
        computed = unloaded - persistent(model).keys()
        leave_meta(model, device, parameters=replicas is None)
        compute_buffers(model, computed, device)
        unloaded -= computed
    if replicas is not None:
        replicate(model, replicas, device)
        accept_whole_state(model)
    note_loaded(model, unloaded)
    collectives = Collectives(_groups(replicas), device, share_memory=plan.transport == "auto")
    runtime = Runtime(slots(model), collectives, Copies(device, _folder(plan)), unloaded)
    rank = 0 if replicas is None else replicas.get_local_rank(plan.data_parallel_axis)
    return Site(model, plan, runtime, rank, device, registry)


def _require_host_state(plan: Plan, device: torch.device) -> None:
    if plan.offload is not None and plan.offload.state and device.type != "cpu":
        raise PlanError(f"offload.state is for parameters on the CPU, these are on {device}; say offload.state=false")


def _groups(mesh: DeviceMesh | None) -> dict[str, dist.ProcessGroup]:
    """Of each axis with several ranks."""
    if mesh is None:
        return {}
    return {axis: mesh.get_group(axis) for axis in mesh.mesh_dim_names or () if mesh[axis].size() > 1}


def _engine(site: Site, mesh: DeviceMesh | None, loss: Loss | None) -> Engine:
    model, plan = site.model, site.plan
    settle = functools.partial(_settle, model, plan, site.runtime, mesh)
    if not plan.model_axes:
        settle(choose_layouts(model, plan))
    engine = Engine(model, plan, site.runtime, mesh, functools.partial(_specialize, site), settle, loss)
    generate = getattr(model, "generate", None)
    if callable(generate):
        model.generate = engine.gather_during(generate)  # type: ignore[assignment]
    return engine


def _pipelined_engine(site: Site, mesh: DeviceMesh, loss: Loss | None) -> PipelinedEngine:
    """mesh: of all axes."""
    plan, alarm = site.plan, site.runtime.collectives.alarm
    schedule = planned_schedule(plan)
    group = mesh.get_group(plan.pipeline_axis)
    peers = peers_of(group, site.device, alarm.look, share_memory=plan.transport == "auto")
    settle = functools.partial(_settle_stages, site, mesh, schedule)
    compile_own = functools.partial(compile_stages, site, schedule)
    search = functools.partial(planned_schedule, plan) if plan.pipeline.schedule == SEARCH else None
    return PipelinedEngine(site.model, plan, site.runtime, mesh, schedule, compile_own, settle, peers, loss, search)


def _settle_stages(site: Site, mesh: DeviceMesh, schedule: Schedule, layouts: Layouts) -> None:
    """Have each parameter lie on the ranks of its stages alone."""
    leave_to_stages(site.model, layouts, mesh, schedule.rank_of_stage)
    _settle(site.model, site.plan, site.runtime, stage_mesh(mesh, site.plan), layouts)


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


def _statement(model: nn.Module, plan: Plan) -> Statement:
    """What all ranks must have in common before the first of them is sharded."""
    described = [f"{_described(name, p)} {p.requires_grad}" for name, p in model.named_parameters()]
    described += [_described(name, buffer) for name, buffer in model.named_buffers()]
    return Statement(
        {
            "plan": str(plan),
            "model": f"{type(model).__name__} of {len(described)} tensors",
            "tensors": "\n".join(described),
        }
    )


def _described(name: str, tensor: torch.Tensor) -> str:
    return f"{name}: {tensor.dtype} {tuple(tensor.shape)}{' on meta' if tensor.is_meta else ''}"


def _specialize(
    site: Site, args: tuple[Any, ...], kwargs: dict[str, Any], seeded: tuple[bool, ...] | None
) -> Specialization:
    """Compile one call and bind it to this rank's runtime."""
    model, plan, runtime = site.model, site.plan, site.runtime
    attributes = AttributeGuard(ModelState(model), model.forward)
    surroundings = Surroundings.now(site.device.type)
    shared_axes = runtime.collectives.shared_axes
    compilation = lower(
        model,
        args,
        kwargs,
        plan,
        decided=runtime.layouts,
        seeded=seeded,
        shared_axes=shared_axes,
        registry=site.registry,
    )
    captured = compilation.captured
    attributes.forget_changed()
    shapes = ShapeGuard(captured)

    def unreduced() -> EmittedFunction:
        with surroundings.restored():
            return unreduced_backward(model, plan, compilation, site.registry)

    executable = Executable(
        halves=compilation.halves,
        forward=compilation.functions["forward"],
        backward=compilation.functions.get("backward"),
        unreduced=functools.cache(unreduced),
        runtime=runtime,
        batch_names=captured.names,
        seeded=compilation.seeded,
        rank=site.rank,
        ranks=plan.data_parallel_ranks,
        device=site.device,
    )
    halves = (compilation.halves.forward, compilation.halves.backward)
    calls = "\n".join(call for half in halves if half is not None for call in collective_calls(half))
    return Specialization(
        executable, compilation.report, attributes, shapes, surroundings, captured.output, calls, compilation.layouts
    )
