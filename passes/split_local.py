"""A call that is computed on a rank's parts of its operands otherwise than by its own operator."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphopt._torch import OpOverload, argument
from graphopt.dimensions.signature import Signature
from graphopt.dimensions.strategies import Cut, Strategy
from graphopt.ir import Phase
from graphopt.ir.moves import OWN_PART
from graphopt.passes.build import Builder

aten = torch.ops.aten
Results = list[fx.Node | None]


@dataclass(frozen=True)
class Local:
    """One call as it was, its operands as the rank has them, and where new calls go."""

    builder: Builder
    node: fx.Node
    signature: Signature
    strategy: Strategy
    operands: list[fx.Node]
    axis: str
    ranks: int

    @property
    def cut(self) -> Cut:
        assert self.strategy.cut is not None
        return self.strategy.cut

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        return self.builder.call(target, *args, like=self.node, phase=Phase.FORWARD, **kwargs)

    def given(self, name: str) -> Any:
        """An argument of the call as it was."""
        return argument(operator_of(self.node), name, self.node.args, self.node.kwargs)

    def whole_shape(self, operand: int) -> list[int]:
        """The shape of an operand as it was."""
        sizes = self.signature.sizes
        return [math.prod(sizes[label] for label in labels) for labels in self.signature.operands[operand]]

    def first_row(self) -> fx.Node:
        """The number of the first row of the rank's part of what is cut, as a tensor of one element."""
        device = self.operands[0].meta["val"].device
        starts = self.call(aten.arange.start_step, 0, self.ranks * self.cut.chunk, self.cut.chunk, device=device)
        return self.call(OWN_PART, starts, 0, 1, 1, self.ranks, self.axis)

    def in_part(self, indices: fx.Node) -> tuple[fx.Node, fx.Node]:
        """Indices counted from the rank's first row, 0 where they lie in another part; and whether they lie in this."""
        counted = self.call(aten.sub.Tensor, indices, self.first_row())
        is_behind = self.call(aten.ge.Scalar, counted, 0)
        is_before = self.call(aten.lt.Scalar, counted, self.cut.chunk)
        inside = self.call(aten.logical_and.default, is_behind, is_before)
        return self.call(aten.mul.Tensor, counted, inside), inside


def operator_of(node: fx.Node) -> OpOverload:
    """The operator that a node calls."""
    assert isinstance(node.target, OpOverload)
    return node.target
