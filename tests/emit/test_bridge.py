"""Backward passes that were not foreseen run forward again: from what it read the first time."""

import copy

import torch
from torch import nn

import graphopt


class _Counting(nn.Module):
    """What it computes depends on how often it was called; two outputs, either of which may get a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: torch.Tensor
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.head = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.calls += 1
        y = self.head(x * (1 + 1 / self.calls))
        return y[:, :1], y


def test_a_gradient_at_another_output_finds_the_buffers_as_they_were() -> None:
    torch.manual_seed(0)
    eager, x = _Counting(), torch.randn(2, 3)
    compiled = graphopt.compile(copy.deepcopy(eager))
    for step in range(3):
        for model in (eager, compiled):
            model.zero_grad()
            model(x)[step % 2].sum().backward()
        assert torch.equal(eager.head.weight.grad, compiled.head.weight.grad), f"step {step}"
        assert torch.equal(eager.calls, compiled.calls)
