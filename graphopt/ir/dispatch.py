"""Moves of rows that are sorted by groups to the ranks that have the groups, and back: tokens to their experts.

    dispatch  [own rows, ...] by group -> [rows, ...]: those of the rank's groups from all ranks, by group, then by the
              rank that they come from, then zeros
    combine   the other way: [rows, ...] -> [own rows, ...], zeros where none was dispatched

Each is the other's adjoint. The groups lie over the axis in equal runs, the last filled up (as in `Part`). ends, int
[ranks * groups]: of each rank in turn, where each group ends among its rows. As moves they are nodes of forward
programs; step programs launch ROWS_OUT and ROWS_BACK and wait for them.
"""

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


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, ends: torch.Tensor, rows: Size, ranks: int, axis: str) -> torch.Tensor:
        ctx.save_for_backward(ends)
        ctx.back = (x.shape[0], ranks, axis)
        return _moved(ROWS_OUT, x, ends, rows, ranks, axis)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        return _moved(ROWS_BACK, gradient, *ctx.saved_tensors, *ctx.back), None, None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, ends: torch.Tensor, rows: Size, ranks: int, axis: str) -> torch.Tensor:
        ctx.save_for_backward(ends)
        ctx.back = (x.shape[0], ranks, axis)
        return _moved(ROWS_BACK, x, ends, rows, ranks, axis)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        return _moved(ROWS_OUT, gradient, *ctx.saved_tensors, *ctx.back), None, None, None, None


def _moved(launch: Any, x: torch.Tensor, ends: torch.Tensor, rows: Size, ranks: int, axis: str) -> torch.Tensor:
    moved: torch.Tensor = functional.wait_tensor(launch(x.contiguous(), ends, rows, ranks, axis))
    return moved


def _of_rows(x: torch.Tensor, ends: torch.Tensor, rows: Size, ranks: int, axis: str) -> torch.Tensor:
    return x.new_empty((rows, *x.shape[1:]))


_library.impl("dispatch", _Dispatch.apply, "Autograd")
_library.impl("combine", _Combine.apply, "Autograd")
for _name in ("dispatch", "combine", "rows_out", "rows_back"):
    torch.library.register_fake(f"graphopt::{_name}", _of_rows, lib=_library)
