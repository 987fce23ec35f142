"""A model whose layers can be split over ``tp`` with no exchange, and a pass that does so by hand."""

from dataclasses import dataclass

import torch
from torch import nn

from graphopt.ir import InputKind, Level, Program, Split
from graphopt.passes import REGISTRY
from graphopt.passes.base import Pass, PassContext
from graphopt.passes.build import Builder

DIMS = {"tied": 0, "first.bias": 0, "scale": 0, "grid": 1}


class Columns(nn.Module):
    """Each rank computes a summand of the loss; all of the part that `other` has in it."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.first, self.other = nn.Linear(6, 8), nn.Linear(6, 5)
        self.scale, self.grid = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(3, 8))
        self.tied = self.first.weight
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.first(x) + nn.functional.linear(x, self.tied)) * self.scale
        columns = (hidden.unsqueeze(1) * self.grid).square().sum((1, 2)).mean()
        other: torch.Tensor = self.dropout(self.other(x))
        return columns + other.square().sum(1).mean()

    def generate(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self(x)
        return found.detach()


@dataclass(frozen=True)
class SplitOptions:
    """axis: the one to split over."""

    axis: str = "tp"


class SplitByHand(Pass):
    """Split the parameters in `DIMS`; what is computed from them is computed in part."""

    name = "split"
    Options = SplitOptions
    level = Level.FORWARD
    produces = Level.FORWARD

    def run(self, program: Program, context: PassContext) -> bool:
        builder, axis = Builder(program, context, self.name), self.options.axis
        for role, node in program.nodes_of(InputKind.PARAMETER):
            layout = context.layouts[role.name]
            assert tuple(node.meta["val"].shape) == layout.whole_shape, "captured whole"
            if role.name in DIMS:
                layout = layout.split_over(Split(axis, context.mesh[axis], DIMS[role.name]))
                context.layouts[role.name] = layout
                node.meta["val"] = builder.fake(layout.shape, layout.dtype, node)
        for node in program.compute_nodes():
            builder.revalue(node)
        return True


BY_HAND = {**REGISTRY, "split": SplitByHand}
