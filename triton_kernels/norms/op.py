"""The operators of norms. What they compute is written in `reference`, where their arguments are told."""

from typing import Any

import torch
from torch import Tensor

from graphopt.triton_kernels.choice import OF_CPU, Family
from graphopt.triton_kernels.registration import check_floating, check_row, check_same, define

NORMS = Family("norms", widest=131072, native=OF_CPU)


def _rms_norm(x: Tensor, weight: Tensor | None, epsilon: float, offset: float, round_first: bool) -> Any:
    check_floating("rms_norm", "x", x)
    check_row("rms_norm", "weight", weight, x)
    return NORMS.run("rms_norm", x, weight, epsilon, offset, round_first)


def _add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, epsilon: float, offset: float, round_first: bool
) -> Any:
    check_floating("add_rms_norm", "x", x)
    check_same("add_rms_norm", "residual", residual, x)
    check_row("add_rms_norm", "weight", weight, x)
    return NORMS.run("add_rms_norm", x, residual, weight, epsilon, offset, round_first)


def _rms_norm_backward(
    gradient: Tensor, x: Tensor, weight: Tensor | None, inverse: Tensor, of_sum: Tensor | None, offset: float
) -> Any:
    _check_gradients("rms_norm_backward", gradient, x, inverse, of_sum)
    check_row("rms_norm_backward", "weight", weight, x)
    return NORMS.run("rms_norm_backward", gradient, x, weight, inverse, of_sum, offset)


def _layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, epsilon: float) -> Any:
    check_floating("layer_norm", "x", x)
    check_row("layer_norm", "weight", weight, x)
    check_row("layer_norm", "bias", bias, x)
    return NORMS.run("layer_norm", x, weight, bias, epsilon)


def _add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, epsilon: float) -> Any:
    check_floating("add_layer_norm", "x", x)
    check_same("add_layer_norm", "residual", residual, x)
    check_row("add_layer_norm", "weight", weight, x)
    check_row("add_layer_norm", "bias", bias, x)
    return NORMS.run("add_layer_norm", x, residual, weight, bias, epsilon)


def _layer_norm_backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    inverse: Tensor,
    of_sum: Tensor | None,
) -> Any:
    _check_gradients("layer_norm_backward", gradient, x, inverse, of_sum)
    check_same("layer_norm_backward", "mean", mean, inverse)
    check_row("layer_norm_backward", "weight", weight, x)
    check_row("layer_norm_backward", "bias", bias, x)
    return NORMS.run("layer_norm_backward", gradient, x, weight, bias, mean, inverse, of_sum)


def _check_gradients(operator: str, gradient: Tensor, x: Tensor, inverse: Tensor, of_sum: Tensor | None) -> None:
    check_floating(operator, "gradient", gradient)
    check_same(operator, "x", x, gradient)
    if inverse.shape != x.shape[:-1] or inverse.dtype != _statistics(x):
        raise ValueError(f"{operator}: inverse is {inverse.dtype} {list(inverse.shape)}, not what the norm of x gave")
    if of_sum is not None:
        check_same(operator, "of_sum", of_sum, gradient)


def _statistics(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _per_row(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:-1], dtype=_statistics(x))


def _of(parameter: Tensor | None, x: Tensor) -> Tensor:
    return x.new_empty(0, dtype=_statistics(x)) if parameter is None else parameter.new_empty(parameter.shape)


RMS_NORM_BACKWARD = define(
    "rms_norm_backward(Tensor gradient, Tensor x, Tensor? weight, Tensor inverse, Tensor? of_sum, float offset)"
    " -> (Tensor, Tensor)",
    _rms_norm_backward,
    lambda gradient, x, weight, inverse, of_sum, offset: (_like(x), _of(weight, x)),
)
LAYER_NORM_BACKWARD = define(
    "layer_norm_backward(Tensor gradient, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor inverse,"
    " Tensor? of_sum) -> (Tensor, Tensor, Tensor)",
    _layer_norm_backward,
    lambda gradient, x, weight, bias, mean, inverse, of_sum: (_like(x), _of(weight, x), _of(bias, x)),
)


def _save_rms(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *_, weight, _, offset, _ = inputs
    *_, inverse = output
    ctx.mark_non_differentiable(inverse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[0] if len(output) == 2 else output[1], weight, inverse)
    ctx.offset = offset


def _of_rms(ctx: Any, gradient: Tensor | None, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, inverse = ctx.saved_tensors
    of_sum = others[0] if len(others) == 2 else None
    gradient = torch.zeros_like(x) if gradient is None else gradient
    of_x, of_weight = RMS_NORM_BACKWARD(gradient, x, weight, inverse, of_sum, ctx.offset)
    return *[of_x] * len(others), None if weight is None else of_weight, None, None, None


def _save_layer(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *_, weight, bias, _ = inputs
    *_, mean, inverse = output
    ctx.mark_non_differentiable(mean, inverse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[0] if len(output) == 3 else output[1], weight, bias, mean, inverse)


def _of_layer(ctx: Any, gradient: Tensor | None, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, bias, mean, inverse = ctx.saved_tensors
    of_sum = others[0] if len(others) == 3 else None
    gradient = torch.zeros_like(x) if gradient is None else gradient
    of_x, of_weight, of_bias = LAYER_NORM_BACKWARD(gradient, x, weight, bias, mean, inverse, of_sum)
    operands = [of_x] * (len(others) - 1)
    return *operands, None if weight is None else of_weight, None if bias is None else of_bias, None


RMS_NORM = define(
    "rms_norm(Tensor x, Tensor? weight, float epsilon, float offset, bool round_first) -> (Tensor, Tensor)",
    _rms_norm,
    lambda x, weight, epsilon, offset, round_first: (_like(x), _per_row(x)),
    save=_save_rms,
    backward=_of_rms,
)
ADD_RMS_NORM = define(
    "add_rms_norm(Tensor x, Tensor residual, Tensor? weight, float epsilon, float offset, bool round_first)"
    " -> (Tensor, Tensor, Tensor)",
    _add_rms_norm,
    lambda x, residual, weight, epsilon, offset, round_first: (_like(x), _like(x), _per_row(x)),
    save=_save_rms,
    backward=_of_rms,
)
LAYER_NORM = define(
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, float epsilon) -> (Tensor, Tensor, Tensor)",
    _layer_norm,
    lambda x, weight, bias, epsilon: (_like(x), _per_row(x), _per_row(x)),
    save=_save_layer,
    backward=_of_layer,
)
ADD_LAYER_NORM = define(
    "add_layer_norm(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float epsilon)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _add_layer_norm,
    lambda x, residual, weight, bias, epsilon: (_like(x), _like(x), _per_row(x), _per_row(x)),
    save=_save_layer,
    backward=_of_layer,
)
