"""No more tokens for an expert than it has room for."""

import math

import torch


def capacity_of(factor: float, tokens: int, top_k: int, experts: int) -> int:
    """The tokens that an expert has room for: `factor` times an even share, rounded up (Fedus et al. 2021, eq. 3)."""
    return math.ceil(factor * tokens * top_k / experts)


def beyond_capacity(chosen: torch.Tensor, experts: int, capacity: int, weights: torch.Tensor | None) -> torch.Tensor:
    """Which choices come after the first `capacity` of their expert: booleans [tokens, top_k].

    chosen: integers [tokens, top_k] below `experts`. weights: of the same shape, if the heaviest come first (batch
    prioritized routing, Riquelme et al. 2021, https://arxiv.org/abs/2106.05974); None if those of earlier tokens do.
    """
    flat = chosen.reshape(-1)
    if weights is None:
        numbers, order = flat.sort(stable=True)
    else:
        heaviest = weights.detach().reshape(-1).argsort(descending=True, stable=True)
        numbers, order = flat[heaviest].sort(stable=True)
        order = heaviest[order]
    starts = torch.searchsorted(numbers, torch.arange(experts, device=numbers.device))
    places = torch.arange(numbers.shape[0], device=numbers.device) - starts[numbers]
    beyond = torch.empty_like(numbers, dtype=torch.bool)
    beyond[order] = places >= capacity
    return beyond.reshape(chosen.shape)
