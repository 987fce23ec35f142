"""Lowered programs for tests of passes and of what reads programs."""

from typing import Any

import torch
from torch import nn

from graphopt.ir import Program
from graphopt.lowering import Compilation, lower
from graphopt.passes.pipeline import PassRecord
from graphopt.plan import Plan


class Mlp(nn.Module):
    """Three linear layers without bias; 16 x 16, so 1,024 bytes each."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(16, 16, bias=False), nn.Tanh()) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


def lowered(text: str, world: int = 2, model: nn.Module | None = None, **kwargs: Any) -> tuple[Compilation, Program]:
    """`model` (an `Mlp` by default) under a plan, and its step program after all passes."""
    programs: list[Program] = []

    def keep(record: PassRecord, program: Program) -> None:
        programs.append(program)

    kwargs = kwargs or {"x": torch.randn(4, 16, requires_grad=True)}
    compilation = lower(model or Mlp(), (), kwargs, Plan.parse(text).resolve(world), observer=keep)
    return compilation, programs[-1]
