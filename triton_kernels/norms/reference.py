"""Norms of rows in operators of torch, in float32 or, of float64, in float64.

    RMSNorm     y = x / sqrt(mean(x^2) + epsilon) * (offset + weight)         Zhang and Sennrich 2019, arXiv:1910.07467
    LayerNorm   y = (x - mean(x)) / sqrt(var(x) + epsilon) * weight + bias    Ba et al. 2016, arXiv:1607.06450

What is called `inverse` is the reciprocal of the root. x is [..., width], weight and bias are [width] or None;
statistics are [...]. Where there is a residual, like x, its sum with x is normalized; and with a mask (bool, like x) x
is dropped out before (Srivastava et al. 2014): x * mask * scale. The mask is drawn outside, by torch, so that it is as
in eager and what is computed here is pure, and may be computed again. All that is not asked for is empty.
"""

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from graphopt.cuda_ext import reference


class Norm(NamedTuple):
    """is_centered: LayerNorm, else RMSNorm. round_first: whether the normalized row is rounded to the dtype of x before
    it is weighted. dtype: of y, None for that of x."""

    epsilon: float
    is_centered: bool
    offset: float = 0.0
    round_first: bool = False
    scale: float = 1.0
    dtype: torch.dtype | None = None


def forward(
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: Norm,
    functions: ModuleType = reference,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, the sum, mean and inverse. functions: those of rows that compute it."""
    dtype = norm.dtype or x.dtype
    wide = torch.promote_types(x.dtype, dtype)
    rows = _rows(x)
    others, kept = (None if each is None else _rows(each) for each in (residual, mask))
    total = None
    if wide != x.dtype:  # functions of rows give y in the dtype of x
        total = reference.summed(rows, others, kept, norm.scale)
        rows, others, kept = (rows if total is None else total).to(wide), None, None
    weight, bias = (_at_least(parameter, wide) for parameter in (weight, bias))
    rounded = weight if norm.round_first and x.dtype.itemsize < 4 else None
    mean = torch.empty(0)
    if norm.is_centered:
        y, added, mean, inverse = functions.layer_norm(rows, weight, bias, norm.epsilon, others, kept, norm.scale)
    else:
        first = weight if rounded is None else None
        y, added, inverse = functions.rms_norm(rows, first, norm.epsilon, others, norm.offset, kept, norm.scale)
    if rounded is not None:
        y = y.to(x.dtype) * (norm.offset + rounded.float())
    total = added if total is None else total
    shape = x.shape[:-1]
    return (
        y.to(dtype).view(x.shape),
        x.new_empty(0) if total is None else total.view(x.shape),
        mean.view(shape) if norm.is_centered else mean,
        inverse.view(shape),
    )


def backward(
    x: Tensor,
    gradient: Tensor,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    inverse: Tensor,
    of_sum: Tensor | None,
    norm: Norm,
    functions: ModuleType = reference,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, to which `of_sum` is added, of what was dropped out, of weight and of bias.

    x: what is normalized, the sum if there is one.
    """
    wide = torch.promote_types(gradient.dtype, x.dtype)
    rows = [None if each is None else _rows(each.to(wide)) for each in (gradient, x, of_sum)]
    kept = None if mask is None else _rows(mask)
    parameter = _at_least(weight, wide)
    statistics = [None if each is None else each.reshape(-1) for each in (mean, inverse)]
    has_bias = bias is not None
    dropped, of_bias = None, None
    if kept is not None:
        dropped, of_x, of_weight, of_bias = functions.dropout_norm_backward(
            *rows[:2], kept, norm.scale, parameter, *statistics, rows[2], norm.offset, has_bias
        )
    elif norm.is_centered:
        of_x, of_weight, of_bias = functions.layer_norm_backward(*rows[:2], parameter, *statistics, rows[2], has_bias)
    else:
        of_x, of_weight = functions.rms_norm_backward(*rows[:2], parameter, statistics[1], rows[2], norm.offset)
    return (
        of_x.to(x.dtype).view(x.shape),
        x.new_empty(0) if dropped is None else dropped.to(x.dtype).view(x.shape),
        _of(weight, of_weight, inverse),
        _of(bias, of_bias, inverse),
    )


def _rows(x: Tensor) -> Tensor:
    return x.reshape(x.shape[:-1].numel(), x.shape[-1]).contiguous()


def _at_least(parameter: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A row of float32 stays, for rows of any dtype; one that is narrower than rows is cast."""
    if parameter is None or parameter.dtype == torch.float32:
        return parameter
    return parameter.to(dtype)


def _of(parameter: Tensor | None, gradient: Tensor | None, inverse: Tensor) -> Tensor:
    if parameter is None or gradient is None:
        return inverse.new_empty(0)
    return gradient.to(parameter.dtype)
