"""Which experts each token goes to and with what weights, in operators of torch: in float32 or, of float64, in float64.

logits: [tokens, experts]; s: `scores` of a token's logits, "softmax" or "sigmoid". The `top_k` experts of largest
s + bias are chosen (Wang et al. 2024, arXiv:2408.15664; bias: float32 [experts] or None), and weigh

    scale * s / (epsilon + sum of s over those chosen)    if normalized, else scale * s

Where experts lie in several `groups` of one size, only those of `top_groups` groups are chosen from: the groups whose
two largest s + bias have the largest sum (DeepSeek-V3, DeepSeek-AI 2024, arXiv:2412.19437, section 2.1.2). Numbers that
are not numbers count as the largest.
"""

import torch
from torch import Tensor

from graphopt.cuda_ext.experts import Weighing

SCORES = ("softmax", "sigmoid")


def route(
    logits: Tensor, bias: Tensor | None, top_k: int, weighing: Weighing, groups: int, top_groups: int
) -> tuple[Tensor, Tensor]:
    """Weights, of float32 at least, and numbers of the experts chosen, int64: both [tokens, top_k], best first."""
    found = _scores(logits.to(torch.promote_types(logits.dtype, torch.float32)), weighing.scores)
    keys = found if bias is None else found + bias
    if top_groups < groups:
        by_group = keys.unflatten(-1, (groups, -1))
        totals = by_group.topk(2, -1).values.sum(-1)
        taken = torch.zeros_like(totals, dtype=torch.bool).scatter_(-1, totals.topk(top_groups, -1).indices, True)
        keys = by_group.masked_fill(~taken.unsqueeze(-1), -torch.inf).flatten(-2)
    chosen = keys.topk(top_k, -1).indices
    weights = found.gather(-1, chosen)
    if weighing.normalized:
        weights = weights / (weights.sum(-1, keepdim=True) + weighing.epsilon)
    return weights * weighing.scale, chosen


def route_backward(logits: Tensor, gradient: Tensor, chosen: Tensor, weighing: Weighing) -> Tensor:
    """The gradient of logits. gradient: of the weights."""
    found = _scores(logits.to(gradient.dtype), weighing.scores)
    picked = found.gather(-1, chosen)
    of_picked = gradient * weighing.scale
    if weighing.normalized:
        total = picked.sum(-1, keepdim=True) + weighing.epsilon
        of_picked = (of_picked - (of_picked * picked).sum(-1, keepdim=True) / total) / total
    of_found = torch.zeros_like(found).scatter_(-1, chosen, of_picked)
    if weighing.scores == "softmax":
        of_found = of_found - (of_picked * picked).sum(-1, keepdim=True)
        return (found * of_found).to(logits.dtype)
    return (found * (1 - found) * of_found).to(logits.dtype)


def _scores(logits: Tensor, scores: str) -> Tensor:
    return logits.softmax(-1) if scores == "softmax" else logits.sigmoid()
