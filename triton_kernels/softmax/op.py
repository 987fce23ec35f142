"""The operator of softmax with scale and mask. What it computes is written in `reference`."""

import math
from typing import Any

import torch
from torch import Tensor

from graphopt.triton_kernels.choice import Family
from graphopt.triton_kernels.registration import check_floating, check_same, define, describe

FAMILY = Family("softmax", widest=131072)


def _softmax(x: Tensor, mask: Tensor | None, scale: float, causal: bool, dtype: torch.dtype | None) -> Tensor:
    check_floating("softmax", "x", x, 2 if causal else 1)
    _check_scale("softmax", scale)
    _check_dtype("softmax", dtype)
    if mask is not None:
        fits = (
            mask.dim() <= x.dim() and mask.device == x.device and (mask.is_floating_point() or mask.dtype == torch.bool)
        )
        sizes = zip(reversed(mask.shape), reversed(x.shape), strict=False)
        if not fits or any(one not in (1, other) for one, other in sizes):
            raise ValueError(
                f"softmax: mask is {describe(mask)}, not bool or floating that broadcasts to {describe(x)}"
            )
    return FAMILY.run("softmax", x, mask, scale, causal, dtype)  # type: ignore[no-any-return]


def _softmax_backward(gradient: Tensor, y: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    check_floating("softmax_backward", "gradient", gradient)
    check_same("softmax_backward", "y", y, gradient)
    _check_scale("softmax_backward", scale)
    _check_dtype("softmax_backward", dtype)
    return FAMILY.run("softmax_backward", gradient, y, scale, dtype)  # type: ignore[no-any-return]


def _check_scale(operator: str, scale: float) -> None:
    if not math.isfinite(scale):
        raise ValueError(f"{operator}: scale is {scale}, not finite")


def _check_dtype(operator: str, dtype: torch.dtype | None) -> None:
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"{operator}: dtype is {dtype}, not floating")


def _fake(x: Tensor, mask: Tensor | None, scale: float, causal: bool, dtype: torch.dtype | None) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype or x.dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, mask, ctx.scale, _, _ = inputs
    ctx.dtype, ctx.mask = x.dtype, mask if mask is None else (mask.shape, mask.dtype)
    ctx.save_for_backward(output)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    (y,) = ctx.saved_tensors
    if not ctx.needs_input_grad[1]:
        return SOFTMAX_BACKWARD(gradient, y, ctx.scale, ctx.dtype), None, None, None, None
    shape, dtype = ctx.mask
    of_scores = SOFTMAX_BACKWARD(gradient, y, 1.0, torch.promote_types(y.dtype, torch.float32))
    of_x = (of_scores * ctx.scale).to(ctx.dtype) if ctx.needs_input_grad[0] else None
    return of_x, of_scores.sum_to_size(shape).to(dtype), None, None, None


SOFTMAX_BACKWARD = define(
    "softmax_backward(Tensor gradient, Tensor y, float scale, ScalarType dtype) -> Tensor",
    _softmax_backward,
    lambda gradient, y, scale, dtype: y.new_empty(y.shape, dtype=dtype),
    family=FAMILY,
)
SOFTMAX = define(
    "softmax(Tensor x, Tensor? mask, float scale, bool causal, ScalarType? dtype) -> Tensor",
    _softmax,
    _fake,
    save=_save,
    backward=_backward,
    family=FAMILY,
)
