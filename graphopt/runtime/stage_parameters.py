"""Parameters of a pipeline's stages: each lies on the ranks that have its stages, and nowhere else."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from graphopt._torch import local_tensor, mesh_of_others, redistribute_in_place
from graphopt.ir import ParameterLayout


@torch.no_grad()
def leave_to_stages(
    model: nn.Module, layouts: Mapping[str, ParameterLayout], mesh: DeviceMesh, rank_of_stage: Sequence[int]
) -> None:
    """Free parameters of stages that other ranks have: the objects stay, as DTensors of which nothing is here.

    mesh: of all axes, that of the pipeline first.
    """
    names = mesh.mesh_dim_names
    assert names is not None
    own = mesh.get_local_rank(0)
    others: dict[int, DeviceMesh] = {}
    for name, parameter in model.named_parameters():
        layout = layouts[name]
        ranks = [rank_of_stage[stage] for stage in layout.stages]
        if own in ranks:
            continue
        assert isinstance(parameter, DTensor)
        first = min(ranks)
        if first not in others:
            others[first] = mesh_of_others(mesh.device_type, mesh.mesh[first], names[1:])
        redistribute_in_place(parameter, _nothing_of(parameter, layout, others[first]))
        parameter.grad = None


def _nothing_of(parameter: DTensor, layout: ParameterLayout, mesh: DeviceMesh) -> DTensor:
    placements: dict[str, Placement] = {split.axis: Shard(split.dim) for split in layout.splits}
    if layout.dim is not None:
        placements[layout.axis] = Shard(layout.dim)
    return DTensor.from_local(
        local_tensor(parameter).new_empty(0),
        mesh,
        [placements.get(axis, Replicate()) for axis in mesh.mesh_dim_names or ()],
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
