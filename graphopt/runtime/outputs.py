"""What a call returns, where each rank has a part of it."""

from collections.abc import Sequence

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from graphopt.ir import Output
from graphopt.ir.layout import whole_shape


def put_together(
    values: Sequence[torch.Tensor], roles: Sequence[Output], mesh: DeviceMesh | None
) -> list[torch.Tensor]:
    """`values` as they are, and as DTensors those of which, by their roles, each rank has a part.

    mesh: of all axes, in the order in which they cut. A DTensor is over those that split it, so data-parallel ranks
    have DTensors of their own.
    """
    return [
        value if mesh is None or not role.splits else _distributed(value, role, mesh)
        for value, role in zip(values, roles, strict=True)
    ]


def _distributed(value: torch.Tensor, role: Output, mesh: DeviceMesh) -> DTensor:
    dims = {split.axis: split.dim for split in role.splits}
    axes = tuple(axis for axis in mesh.mesh_dim_names or () if axis in dims)
    whole = torch.empty(whole_shape(value.shape, role.splits), device="meta")
    return DTensor.from_local(
        value,
        mesh[axes],
        [Shard(dims[axis]) for axis in axes],
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )
