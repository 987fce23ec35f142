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

    Its axes are those that split the model, then the data-parallel one: in that order they cut a parameter. Starts the
    default process group from the launcher's environment, if nobody has.
    """
    sizes = dict(plan.mesh)
    if all(size == 1 for size in sizes.values()):
        return None
    data = plan.data_parallel_axis
    axes = (*plan.model_axes, data)
    ranks = torch.arange(math.prod(sizes.values())).view(tuple(sizes.values()))
    ranks = ranks.movedim(list(sizes).index(data), -1).reshape([sizes[axis] for axis in axes])
    return DeviceMesh(device.type, ranks, mesh_dim_names=axes)
