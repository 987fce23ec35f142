"""Tokens by expert and back, in operators of torch.

    sort_by_expert       choices of experts by their number, those of one expert in the order in which they come
    permute_tokens       rows[places[t, j]] = x[t]
    unpermute_tokens     y[t] = sum over j of weights[t, j] * rows[places[t, j]]

chosen: integers [...]; numbers that are none of 0 to experts - 1 are of no expert, and stand behind all others. x, y:
[tokens, width], rows: [tokens * top_k, width], places: int64 [tokens, top_k], each row's once, weights: [tokens, top_k]
or None for 1. Sums are in float32 at least, in one order, and rounded once.
"""

import torch
from torch import Tensor


def sort_by_expert(chosen: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which choice stands where, int64 [n]; where each stands, int64 [...]; where experts end, int32 [experts]."""
    flat = chosen.reshape(-1)
    numbers, order = flat.masked_fill((flat < 0) | (flat >= experts), experts).sort(stable=True)
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=order.device)
    ends = torch.searchsorted(numbers, torch.arange(experts, device=order.device), right=True)
    return order, places.view(chosen.shape), ends.to(torch.int32)


def permute_tokens(x: Tensor, places: Tensor) -> Tensor:
    rows = x.new_empty(places.numel(), x.shape[1])
    rows[places] = x.unsqueeze(1).expand(*places.shape, x.shape[1])
    return rows


def unpermute_tokens(rows: Tensor, weights: Tensor | None, places: Tensor) -> Tensor:
    picked = _exact(rows[places])
    if weights is not None:
        picked = picked * weights.to(picked.dtype).unsqueeze(-1)
    return picked.sum(1).to(rows.dtype)


def unpermute_tokens_backward(gradient: Tensor, rows: Tensor, weights: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of rows and weights."""
    wide = _exact(gradient).unsqueeze(1)
    of_rows = torch.empty_like(rows, memory_format=torch.contiguous_format)
    of_rows[places] = (wide * weights.to(wide.dtype).unsqueeze(-1)).to(rows.dtype)
    return of_rows, (wide * _exact(rows[places])).sum(-1).to(weights.dtype)


def _exact(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
