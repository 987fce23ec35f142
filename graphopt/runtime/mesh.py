"""The device mesh that a plan asks for, over the process group that is there."""

import math
import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from graphopt.plan import Plan


def world_size() -> int:
    """Ranks of the job: of the process group, of the launcher that started this process, or one."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def device_mesh(plan: Plan, device: torch.device) -> DeviceMesh | None:
    """The mesh of a resolved plan; None in a world of one, where nothing is distributed.

    Its axes are that of the pipeline, if there is one, those that split layers, then the data-parallel one: in that
    order they cut a parameter. Starts the default process group from the launcher's environment, if nobody has.
    """
    sizes = dict(plan.mesh)
    if all(size == 1 for size in sizes.values()):
        return None
    cut = (plan.pipeline_axis,) if plan.pipeline_ranks > 1 else ()
    axes = (*cut, *plan.model_axes, plan.data_parallel_axis)
    named = list(sizes)
    ranks = torch.arange(math.prod(sizes.values())).view(tuple(sizes.values()))
    others = [named.index(axis) for axis in named if axis not in axes]  # of one rank each
    ranks = ranks.permute([*others, *(named.index(axis) for axis in axes)]).reshape([sizes[axis] for axis in axes])
    return DeviceMesh(device.type, ranks, mesh_dim_names=axes)


def stage_mesh(mesh: DeviceMesh, plan: Plan) -> DeviceMesh:
    """The ranks that have the same stages as this one; all of them, where there is no pipeline."""
    names = mesh.mesh_dim_names or ()
    return mesh[tuple(axis for axis in names if axis != plan.pipeline_axis)]
