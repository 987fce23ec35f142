"""Products of groups of rows, each group with a matrix of its own: what the experts of a mixture do.

    grouped_mm      rows [t, k], matrices [e, k, n], ends [e] -> [t, n]
    grouped_outer   rows [t, k], others [t, n],      ends [e] -> [e, k, n]

Group i is the rows from ends[i - 1] up to ends[i], perhaps none; ends are int32 and do not decrease. Rows past the last
end are of no group: `grouped_mm` gives zeros there, and `grouped_outer` does not read them. Gradients of either are
calls of the two. torch's own operator leaves such rows unset, takes no float64, and is traced in bfloat16 alone.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional as F

_ALIGNMENT = 16  # bytes, of what torch's kernel reads

_library = torch.library.Library("graphopt", "FRAGMENT")
_library.define("grouped_mm(Tensor rows, Tensor matrices, Tensor ends) -> Tensor")
_library.define("grouped_outer(Tensor rows, Tensor others, Tensor ends) -> Tensor")

GROUPED_MM = torch.ops.graphopt.grouped_mm.default
GROUPED_OUTER = torch.ops.graphopt.grouped_outer.default


def _mm(rows: torch.Tensor, matrices: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    if _is_native(rows) and _is_native(matrices):
        native = F.grouped_mm(rows, matrices, offs=ends).contiguous()
        is_past = torch.arange(len(rows), device=rows.device) >= ends[-1]
        return native.masked_fill_(is_past[:, None], 0)
    result = rows.new_zeros(len(rows), matrices.shape[-1])
    for matrix, group in zip(matrices, _groups(ends), strict=True):
        torch.mm(rows[group], matrix, out=result[group])
    return result


def _outer(rows: torch.Tensor, others: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    if _is_native(rows) and _is_native(others):
        return F.grouped_mm(rows.t(), others, offs=ends).contiguous()
    result = rows.new_empty(len(ends), rows.shape[-1], others.shape[-1])
    for matrix, group in zip(result, _groups(ends), strict=True):
        torch.mm(rows[group].t(), others[group], out=matrix)
    return result


def _is_native(operand: torch.Tensor) -> bool:
    """Whether torch's kernel takes it, which does not ask on the host where groups end: aligned bfloat16."""
    lines = operand if operand.stride(-1) == 1 else operand.mT
    return (
        operand.dtype is torch.bfloat16
        and operand.numel() > 0
        and lines.stride(-1) == 1
        and lines.stride(-2) >= lines.shape[-1]
        and operand.data_ptr() % _ALIGNMENT == 0
        and all(stride * operand.element_size() % _ALIGNMENT == 0 for stride in lines.stride()[:-1])
    )


def _groups(ends: torch.Tensor) -> Iterator[slice]:
    start = 0
    for end in ends.tolist():
        yield slice(start, end)
        start = end


def _like_mm(rows: torch.Tensor, matrices: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return rows.new_empty(rows.shape[0], matrices.shape[-1])  # where len would make a symbolic size a number


def _like_outer(rows: torch.Tensor, others: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return rows.new_empty(ends.shape[0], rows.shape[-1], others.shape[-1])


def _save(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _of_mm(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    rows, matrices, ends = ctx.saved_tensors
    of_rows, of_matrices, _ = ctx.needs_input_grad
    return (
        GROUPED_MM(gradient, matrices.mT, ends) if of_rows else None,
        GROUPED_OUTER(rows, gradient, ends) if of_matrices else None,
        None,
    )


def _of_outer(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    rows, others, ends = ctx.saved_tensors
    of_rows, of_others, _ = ctx.needs_input_grad
    return (
        GROUPED_MM(others, gradient.mT, ends) if of_rows else None,
        GROUPED_MM(rows, gradient, ends) if of_others else None,
        None,
    )


for _name, _kernel, _fake, _backward in (
    ("grouped_mm", _mm, _like_mm, _of_mm),
    ("grouped_outer", _outer, _like_outer, _of_outer),
):
    for _device in ("CPU", "CUDA"):
        _library.impl(_name, _kernel, _device)
    torch.library.register_fake(f"graphopt::{_name}", _fake, lib=_library)
    torch.library.register_autograd(f"graphopt::{_name}", _backward, setup_context=_save, lib=_library)
