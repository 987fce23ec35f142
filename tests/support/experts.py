"""A small model with a mixture of experts, and its batch."""

from typing import Any

import torch
from torch import nn

from graphopt.experts import Experts

WIDTH = 16
OPTIONS: dict[str, dict[str, Any]] = {
    "dropless": {},
    "capacity": {"capacity": 0.7},
    "by weight, with biases": {"capacity": 0.7, "priority": "weight", "scores": "sigmoid", "bias_speed": 0.01},
    "plain, shared": {"gated": False, "activation": "gelu", "shared": 1, "normalized": False, "bias_speed": 0.01},
}


class WithExperts(nn.Module):
    """A layer, and a residual block of experts: the loss is a mean square, with the router's losses times `factor`."""

    def __init__(self, factor: float = 0.01, **options: Any) -> None:
        super().__init__()
        self.factor = factor
        self.into = nn.Linear(WIDTH, WIDTH)
        self.block = Experts(WIDTH, 24, 4, 2, **options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.into(x)
        y, routing = self.block(x)
        return (x + y).square().mean() + self.factor * (routing.balance_loss + routing.z_loss)


def with_experts(factor: float = 0.01, **options: Any) -> WithExperts:
    """The same model whenever it is built, in training."""
    torch.manual_seed(0)
    return WithExperts(factor, **options).train()


def vectors(rows: int = 4, length: int = 9) -> dict[str, torch.Tensor]:
    """A batch of vectors."""
    return {"x": torch.randn(rows, length, WIDTH)}
