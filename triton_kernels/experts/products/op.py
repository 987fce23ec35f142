"""The operators of products by group. What they compute is written in `reference`.

Gradients of either are calls of the two, so there are second ones.
"""

from typing import Any

import torch
from torch import Tensor

from graphopt.triton_kernels.choice import OF_CPU, Choice, Family
from graphopt.triton_kernels.experts.products import torchs
from graphopt.triton_kernels.registration import check_floating, define, describe


class _Products(Family):
    """Says where the product is that of torch."""

    def choose(self, x: Tensor) -> Choice:
        choice = super().choose(x)
        if choice.variant != "triton" or not torchs.is_fast(x):
            return choice
        return choice._replace(why=f"{choice.why}; by torch's own kernel, which is as fast, where rows are aligned")


FAMILY = _Products("experts.products", widest=2**31 - 1, native=OF_CPU, of_models=True)
_MOST_GROUPS = 4095  # whose ends a program holds


def _grouped_mm(rows: Tensor, matrices: Tensor, ends: Tensor) -> Any:
    _check_rows("grouped_mm", "rows", rows)
    fits = matrices.dim() == 3 and matrices.shape[1] == rows.shape[1]
    if not fits or matrices.dtype != rows.dtype or matrices.device != rows.device:
        wanted = f"{rows.dtype} [groups, {rows.shape[1]}, n] on {rows.device}"
        raise ValueError(f"grouped_mm: matrices is {describe(matrices)}, not {wanted}")
    _check_ends("grouped_mm", ends, rows)
    if len(ends) != len(matrices):
        raise ValueError(f"grouped_mm: ends is {describe(ends)}, for {len(matrices)} matrices")
    return FAMILY.run("grouped_mm", rows, matrices, ends)


def _grouped_outer(rows: Tensor, others: Tensor, ends: Tensor) -> Any:
    _check_rows("grouped_outer", "rows", rows)
    _check_rows("grouped_outer", "others", others)
    if len(others) != len(rows) or others.dtype != rows.dtype or others.device != rows.device:
        wanted = f"{rows.dtype} [{len(rows)}, n] on {rows.device}"
        raise ValueError(f"grouped_outer: others is {describe(others)}, not {wanted}")
    _check_ends("grouped_outer", ends, rows)
    return FAMILY.run("grouped_outer", rows, others, ends)


def _check_rows(operator: str, name: str, rows: Tensor) -> None:
    check_floating(operator, name, rows)
    if rows.dim() != 2:
        raise ValueError(f"{operator}: {name} is {describe(rows)}, not [rows, width]")


def _check_ends(operator: str, ends: Tensor, rows: Tensor) -> None:
    """What ends are is seen on the CPU alone, where nobody waits for it."""
    if ends.dim() != 1 or ends.dtype != torch.int32 or ends.device != rows.device:
        raise ValueError(f"{operator}: ends is {describe(ends)}, not int32 [groups] on {rows.device}")
    if not 1 <= len(ends) <= _MOST_GROUPS:
        raise ValueError(f"{operator}: ends is {describe(ends)}, not of 1 to {_MOST_GROUPS} groups")
    if ends.is_cpu:
        known = ends.tolist()
        if sorted([0, *known, len(rows)]) != [0, *known, len(rows)]:
            raise ValueError(f"{operator}: ends decrease, or do not lie within {len(rows)} rows: {known}")


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _of_mm(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    rows, matrices, ends = ctx.saved_tensors
    of_rows, of_matrices, _ = ctx.needs_input_grad
    return (
        GROUPED_MM(gradient, matrices.mT, ends) if of_rows else None,
        _like_matrices(rows, gradient, ends, matrices) if of_matrices else None,
        None,
    )


def _like_matrices(rows: Tensor, gradient: Tensor, ends: Tensor, matrices: Tensor) -> Tensor:
    """Which lies in memory as they do: the gradient of a parameter that is multiplied transposed is not copied."""
    is_turned = matrices.stride(-1) != 1 and matrices.stride(-2) == 1
    result: Tensor = GROUPED_OUTER(gradient, rows, ends) if is_turned else GROUPED_OUTER(rows, gradient, ends)
    return result.mT if is_turned else result


def _of_outer(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    rows, others, ends = ctx.saved_tensors
    of_rows, of_others, _ = ctx.needs_input_grad
    return (
        GROUPED_MM(others, gradient.mT, ends) if of_rows else None,
        GROUPED_MM(rows, gradient, ends) if of_others else None,
        None,
    )


# Sizes by shape, where len would make a symbolic one a number.
GROUPED_MM = define(
    "grouped_mm(Tensor rows, Tensor matrices, Tensor ends) -> Tensor",
    _grouped_mm,
    lambda rows, matrices, ends: rows.new_empty(rows.shape[0], matrices.shape[-1]),
    save=_save,
    backward=_of_mm,
    family=FAMILY,
)
GROUPED_OUTER = define(
    "grouped_outer(Tensor rows, Tensor others, Tensor ends) -> Tensor",
    _grouped_outer,
    lambda rows, others, ends: rows.new_empty(ends.shape[0], rows.shape[-1], others.shape[-1]),
    save=_save,
    backward=_of_outer,
    family=FAMILY,
)
