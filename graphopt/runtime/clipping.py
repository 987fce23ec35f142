"""The norm of all gradients of a model, wherever they lie, and gradients scaled down to a largest norm."""

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from graphopt._torch import all_gather_single, local_tensor
from graphopt.errors import GraphoptError


@torch.no_grad()
def clip_grad_norm_(
    model: nn.Module,
    max_norm: float,
    norm_type: float,
    error_if_nonfinite: bool,
    counts: Callable[[str], bool],
    group: dist.ProcessGroup | None,
    device: torch.device,
) -> torch.Tensor:
    """As `graphopt.clip_grad_norm_` says.

    counts: whether a parameter of this rank, by name, is counted here rather than on the rank of another of its stages.
    group: of all ranks, None for a world of one. device: where the norm is computed.
    """
    if not norm_type > 0:
        raise GraphoptError(f"norm_type is {norm_type}; give a number above 0, or inf for the largest element")
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    counted = [
        local_tensor(gradient)
        for name, gradient in gradients.items()
        if gradient.numel() and counts(name) and _is_first(gradient)
    ]
    norm = torch.nn.utils.get_total_norm([each for each in counted if each.numel()], norm_type).to(device)
    if group is not None:
        norms = torch.empty(dist.get_world_size(group), dtype=torch.float64, device=device)
        all_gather_single(norms, norm.double().view(1), group=group)
        norm = torch.linalg.vector_norm(norms, norm_type).float()
    if error_if_nonfinite and not math.isfinite(norm):
        raise GraphoptError(
            f"the norm of order {norm_type} of the gradients is {float(norm)}, so they cannot be scaled"
        )
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
    return all(
        at == 0 or not placement.is_replicate() for at, placement in zip(place, gradient.placements, strict=True)
    )
