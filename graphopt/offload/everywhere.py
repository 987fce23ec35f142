"""An error of one rank becomes one of all: none of them waits for a rank that has stopped."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from graphopt.errors import OffloadError
from graphopt.runtime.agreement import exchanged


def raise_everywhere(error: Exception | None, meshes: Iterable[DeviceMesh]) -> None:
    """Raise `error` on its own rank, and OffloadError that quotes it on the others of `meshes`; all call this together.

    One small all-reduce for each dimension of a mesh, if nothing is wrong.
    """
    said = [] if error is None else [f"rank {dist.get_rank() if dist.is_initialized() else 0}: {error}"]
    for mesh in meshes:
        for dimension in range(mesh.ndim):
            group = mesh.get_group(dimension)
            failed = torch.tensor(len(said), device=mesh.device_type)
            dist.all_reduce(failed, group=group)
            if failed.item():
                said = list(dict.fromkeys(text for texts in exchanged(said, group) for text in texts))
    if error is not None:
        raise error
    if said:
        raise OffloadError("; ".join(said))
