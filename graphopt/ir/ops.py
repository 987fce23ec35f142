"""Collectives with derivatives, for passes at the forward level.

Each is recorded as the functional collectives of which it consists, so step graphs hold only those. The axis is a mesh
axis name, bound to a process group when the program is emitted.
"""

from typing import Any

import torch

functional = torch.ops._c10d_functional


class _AllReduce(torch.autograd.Function):
    """Sum over the ranks; each rank's loss depends on every part, so the gradient is summed too."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, axis: str) -> torch.Tensor:
        ctx.axis = axis
        reduced: torch.Tensor = functional.wait_tensor(functional.all_reduce(value, "sum", axis))
        return reduced

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return functional.wait_tensor(functional.all_reduce(gradient.contiguous(), "sum", ctx.axis)), None


_library = torch.library.Library("graphopt", "DEF")
_library.define("all_reduce(Tensor value, str axis) -> Tensor")
_library.impl("all_reduce", _AllReduce.apply, "Autograd")
_library.impl("all_reduce", lambda value, axis: torch.empty_like(value), "Meta")

all_reduce = torch.ops.graphopt.all_reduce.default
