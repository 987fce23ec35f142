"""The norm of all gradients of a model, wherever they lie, and gradients scaled down to a largest norm."""

import math
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from graphopt._torch import all_gather_single, local_tensor
from graphopt.errors import GraphoptError
from graphopt.runtime.state import Runtime


@torch.no_grad()
def clip_grad_norm_(
    model: nn.Module, runtime: Runtime, pipeline_rank: int, owners: Mapping[str, int], max_norm: float,
    norm_type: float, error_if_nonfinite: bool,
) -> torch.Tensor:  # fmt: skip
    """As `graphopt.clip_grad_norm_` says.

    pipeline_rank: this one's place along the pipeline. owners: of each parameter that several of its ranks have, that
    which counts it.
    """
    if not norm_type > 0:
        raise GraphoptError(f"norm_type is {norm_type}; give a number above 0, or inf for the largest element")
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    counted = [
        local_tensor(gradient)
        for name, gradient in gradients.items()
        if owners.get(name, pipeline_rank) == pipeline_rank and _is_first(gradient)
    ]
    norm = torch.nn.utils.get_total_norm([g for g in counted if g.numel()], norm_type).to(runtime.collectives.device)
    if dist.is_initialized() and runtime.is_distributed:
        norms = norm.new_empty(dist.get_world_size(), dtype=torch.float32)
        all_gather_single(norms, norm.float().view(1))
        norm = torch.linalg.vector_norm(norms, norm_type)
    if error_if_nonfinite and not math.isfinite(norm):
        raise GraphoptError(f"the norm of order {norm_type} of the gradients is {float(norm)}, so they cannot be scaled")
    factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    for gradient in gradients.values():
        local = local_tensor(gradient)
        local.mul_(factor.to(local.device, local.dtype))
    return norm


def _is_first(gradient: torch.Tensor) -> bool:
    """Whether this rank is the first of those that hold the same of it."""
    if not isinstance(gradient, DTensor):
        return True
    place = gradient.device_mesh.get_coordinate()
    assert place is not None
    return all(at == 0 or not placement.is_replicate() for at, placement in zip(place, gradient.placements, strict=True))
