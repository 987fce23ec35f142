"""A mixture of experts written out: token by token, expert by expert, in float64."""

import math

import torch
from torch.nn import functional as F

from graphopt.experts import Experts

_ACT = {"silu": lambda v: v / (1 + torch.exp(-v)), "gelu": F.gelu, "relu": lambda v: v.clamp(min=0)}


def _one(block: Experts, up: torch.Tensor, down: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    inner, act = up @ token, _ACT[block.activation]
    if block.gated:
        half = len(inner) // 2
        inner = act(inner[:half]) * inner[half:]
    else:
        inner = act(inner)
    return down @ inner


def _choices(block: Experts, scores: torch.Tensor) -> list[list[int]]:
    biased = scores.detach() if block.router.bias is None else scores.detach() + block.router.bias
    by_score = [sorted(range(len(row)), key=lambda e, row=row: -row[e].item()) for row in biased]
    return [numbers[: block.router.top_k] for numbers in by_score]


def _kept(block: Experts, choices: list[list[int]], weights: list[list[torch.Tensor]]) -> set[tuple[int, int]]:
    """Pairs of token and expert for which there is room."""
    router = block.router
    pairs = [(token, slot) for token, numbers in enumerate(choices) for slot in range(len(numbers))]
    room = math.inf
    if router.capacity is not None:
        room = math.ceil(router.capacity * len(choices) * router.top_k / router.experts)
        if router.priority == "weight":
            pairs.sort(key=lambda pair: -weights[pair[0]][pair[1]].item())
    taken = [0] * router.experts
    kept = set()
    for token, slot in pairs:
        expert = choices[token][slot]
        taken[expert] += 1
        if taken[expert] <= room:
            kept.add((token, expert))
    return kept


def reference(block: Experts, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `block` gives for float64 x [..., hidden], its load-balancing loss and its z loss."""
    router = block.router
    tokens = x.reshape(-1, x.shape[-1])
    logits = torch.stack([router.weight @ token for token in tokens])
    powers = torch.exp(logits)
    scores = powers / powers.sum(1, keepdim=True) if router.scores == "softmax" else 1 / (1 + 1 / powers)
    choices = _choices(block, scores)
    weights = [[scores[token, expert] for expert in numbers] for token, numbers in enumerate(choices)]
    if router.normalized:
        weights = [[weight / sum(row) for weight in row] for row in weights]
    kept = _kept(block, choices, weights)
    rows = []
    for token, numbers in enumerate(choices):
        total = torch.zeros_like(tokens[token])
        for weight, expert in zip(weights[token], numbers, strict=True):
            if (token, expert) in kept:
                total = total + weight * _one(block, block.up[expert], block.down[expert], tokens[token])
        if block.shared is not None:
            total = total + _one(block, block.shared.up.weight, block.shared.down.weight, tokens[token])
        rows.append(total)
    shares = scores / scores.sum(1, keepdim=True)
    loads = [sum(numbers.count(expert) for numbers in choices) for expert in range(router.experts)]
    balance = torch.stack([load / len(tokens) * shares[:, expert].mean() for expert, load in enumerate(loads)]).sum()
    return torch.stack(rows).reshape(x.shape), router.experts * balance, (torch.log(powers.sum(1)) ** 2).mean()
