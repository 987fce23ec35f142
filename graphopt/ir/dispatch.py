"""Moves of rows that are sorted by groups to the ranks that have the groups, and back: tokens to their experts.

    dispatch  [own rows, ...] by group -> [rows, ...]: those of the rank's groups from all ranks, by group, then by the
              rank that they come from, then zeros
    combine   the other way: [rows, ...] -> [own rows, ...], zeros where none was dispatched

Each is the other's adjoint. The groups lie over the axis in equal runs, the last filled up (as in `Part`). ends, int
[ranks * groups]: of each rank in turn, where each group ends among its rows. As moves they are nodes of forward
programs; step programs launch ROWS_OUT and ROWS_BACK and wait for them.
"""

from collections.abc import Callable
from typing import Any

import torch

functional = torch.ops._c10d_functional
Size = int | torch.SymInt

_library = torch.library.Library("graphopt", "FRAGMENT")
for _name in ("dispatch", "combine", "rows_out", "rows_back"):
    _library.define(f"{_name}(Tensor x, Tensor ends, SymInt rows, int ranks, str axis) -> Tensor")

DISPATCH = torch.ops.graphopt.dispatch.default
COMBINE = torch.ops.graphopt.combine.default
ROWS_OUT = torch.ops.graphopt.rows_out.default
ROWS_BACK = torch.ops.graphopt.rows_back.default


class _Moved(torch.autograd.Function):
    """By one of the two, and gradients by the other."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, ends: torch.Tensor, rows: Size, ranks: int, axis: str, there: Any, back: Any
    ) -> torch.Tensor:
        ctx.save_for_backward(ends)
        ctx.back = (back, x.shape[0], ranks, axis)
        return _moved(there, x, ends, rows, ranks, axis)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        back, *sizes = ctx.back
        return _moved(back, gradient, *ctx.saved_tensors, *sizes), *[None] * 6


def _move(there: Any, back: Any) -> Callable[..., torch.Tensor]:
    return lambda *given: _Moved.apply(*given, there, back)  # type: ignore[no-untyped-call, no-any-return]


def _moved(launch: Any, x: torch.Tensor, ends: torch.Tensor, rows: Size, ranks: int, axis: str) -> torch.Tensor:
    moved: torch.Tensor = functional.wait_tensor(launch(x.contiguous(), ends, rows, ranks, axis))
    return moved


def _of_rows(x: torch.Tensor, ends: torch.Tensor, rows: Size, ranks: int, axis: str) -> torch.Tensor:
    return x.new_empty((rows, *x.shape[1:]))


for _name, _there, _back in (("dispatch", ROWS_OUT, ROWS_BACK), ("combine", ROWS_BACK, ROWS_OUT)):
    _library.impl(_name, _move(_there, _back), "Autograd")
for _name in ("dispatch", "combine", "rows_out", "rows_back"):
    torch.library.register_fake(f"graphopt::{_name}", _of_rows, lib=_library)
