"""What ranks have alike stays alike: a check of all parameters."""

import hashlib
from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Replicate

from graphopt.errors import RankMismatchError
from graphopt.runtime.agreement import exchanged


def check_replicas(model: nn.Module) -> None:
    """Compare, bit by bit, each parameter between the ranks that hold the same of it; all ranks call this together.

    Digests travel, not values. Buffers may differ by design, such as statistics of each rank's own batch. Raises
    RankMismatchError, on the ranks of that group, which names the parameters, the mesh axis and the ranks.
    """
    parameters = {name: p for name, p in model.named_parameters() if isinstance(p, DTensor)}
    meshes = list(dict.fromkeys(parameter.device_mesh for parameter in parameters.values()))
    for mesh in meshes:
        if mesh.get_coordinate() is None:
            continue
        for dim, axis in enumerate(mesh.mesh_dim_names or ()):
            alike = {
                name: _digest(parameter.to_local())
                for name, parameter in parameters.items()
                if parameter.device_mesh == mesh and isinstance(parameter.placements[dim], Replicate)
            }
            differing = "; ".join(_differences(exchanged(alike, mesh.get_group(dim))))
            if differing:
                raise RankMismatchError(f"what the ranks of {axis} should have alike is not: {differing}")
    if parameters and any(exchanged(any(mesh.get_coordinate() is None for mesh in meshes), _world())):
        _compare_stages(parameters)


def _world() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None
    return group


def _compare_stages(parameters: Mapping[str, DTensor]) -> None:
    """Compare what several stages of a pipeline have: by name, and by place along the axes that cut it."""
    own = {}
    for name, parameter in parameters.items():
        place = parameter.device_mesh.get_coordinate()
        if place is not None:
            parts = [at for at, it in zip(place, parameter.placements, strict=True) if not isinstance(it, Replicate)]
            own[f"{name} {parts}"] = _digest(parameter.to_local())
    first: dict[str, tuple[int, str]] = {}
    for rank, theirs in enumerate(exchanged(own, _world())):
        for part, digest in theirs.items():
            known, wanted = first.setdefault(part, (rank, digest))
            if digest != wanted:
                name = part.partition(" ")[0]
                raise RankMismatchError(
                    f"what stages share should be alike: {name} of rank {rank} is not that of {known}"
                )


def _digest(value: torch.Tensor) -> str:
    raw = value.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return hashlib.blake2b(raw.numpy().tobytes(), digest_size=16).hexdigest()


def _differences(digests: list[dict[str, str]]) -> Iterator[str]:
    for name, digest in digests[0].items():
        others = [rank for rank, theirs in enumerate(digests) if theirs[name] != digest]
        if others:
            yield f"{name} differs from that of rank 0 on {', '.join(f'rank {rank}' for rank in others)}"
