"""The operators of norms. What they compute is written in `reference`, where their arguments are told."""

from typing import Any

import torch
from torch import Tensor

from graphopt.triton_kernels.choice import OF_CPU, Family
from graphopt.triton_kernels.norms.reference import Norm
from graphopt.triton_kernels.registration import check_floating, check_row, check_same, define, describe

NORMS = Family("norms", widest=131072, native=OF_CPU)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of results, whatever that of x


def _rms_norm(
    x: Tensor,
    weight: Tensor | None,
    epsilon: float,
    offset: float,
    round_first: bool,
    dtype: torch.dtype | None = None,
) -> Any:
    _check("rms_norm", x, weight, dtype=dtype)
    norm = Norm(epsilon, False, offset, round_first, dtype=dtype)
    y, _, _, inverse = NORMS.run("forward", x, None, None, weight, None, norm)
    return y, inverse


def _add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    epsilon: float,
    offset: float,
    round_first: bool,
    mask: Tensor | None = None,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
) -> Any:
    _check("add_rms_norm", x, weight, None, residual, mask, dtype)
    norm = Norm(epsilon, False, offset, round_first, scale, dtype)
    y, total, _, inverse = NORMS.run("forward", x, residual, mask, weight, None, norm)
    return y, total, inverse


def _rms_norm_backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor | None,
    inverse: Tensor,
    of_sum: Tensor | None,
    offset: float,
    mask: Tensor | None = None,
    scale: float = 1.0,
) -> Any:
    _check_gradients("rms_norm_backward", gradient, x, weight, None, inverse, of_sum, mask)
    norm = Norm(0.0, False, offset, scale=scale)
    of_x, dropped, of_weight, _ = NORMS.run("backward", x, gradient, mask, weight, None, None, inverse, of_sum, norm)
    return of_x, dropped, of_weight


def _layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, epsilon: float, dtype: torch.dtype | None = None
) -> Any:
    _check("layer_norm", x, weight, bias, dtype=dtype)
    y, _, mean, inverse = NORMS.run("forward", x, None, None, weight, bias, Norm(epsilon, True, dtype=dtype))
    return y, mean, inverse


def _add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    epsilon: float,
    mask: Tensor | None = None,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
) -> Any:
    _check("add_layer_norm", x, weight, bias, residual, mask, dtype)
    return NORMS.run("forward", x, residual, mask, weight, bias, Norm(epsilon, True, scale=scale, dtype=dtype))


def _layer_norm_backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    inverse: Tensor,
    of_sum: Tensor | None,
    mask: Tensor | None = None,
    scale: float = 1.0,
) -> Any:
    _check_gradients("layer_norm_backward", gradient, x, weight, bias, inverse, of_sum, mask)
    check_same("layer_norm_backward", "mean", mean, inverse)
    norm = Norm(0.0, True, scale=scale)
    return NORMS.run("backward", x, gradient, mask, weight, bias, mean, inverse, of_sum, norm)


def _check(
    operator: str,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    check_floating(operator, "x", x)
    if residual is not None:
        check_same(operator, "residual", residual, x)
    _check_mask(operator, mask, x)
    check_row(operator, "weight", weight, x)
    check_row(operator, "bias", bias, x)
    if dtype is not None and dtype not in (x.dtype, *_DTYPES):
        raise ValueError(f"{operator}: dtype is {dtype}, not {x.dtype} as x nor one of {', '.join(map(str, _DTYPES))}")


def _check_mask(operator: str, mask: Tensor | None, x: Tensor) -> None:
    if mask is not None and (mask.dtype != torch.bool or mask.shape != x.shape or mask.device != x.device):
        raise ValueError(f"{operator}: mask is {describe(mask)}, not bool {list(x.shape)} on {x.device}")


def _check_gradients(
    operator: str,
    gradient: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    inverse: Tensor,
    of_sum: Tensor | None,
    mask: Tensor | None,
) -> None:
    check_floating(operator, "gradient", gradient)
    check_floating(operator, "x", x)
    if x.shape != gradient.shape or x.device != gradient.device:
        raise ValueError(f"{operator}: x is {describe(x)}, not of the shape of gradient, {describe(gradient)}")
    if inverse.shape != x.shape[:-1] or inverse.dtype != _statistics(x):
        raise ValueError(f"{operator}: inverse is {inverse.dtype} {list(inverse.shape)}, not what the norm of x gave")
    if of_sum is not None:
        check_same(operator, "of_sum", of_sum, x)
    _check_mask(operator, mask, x)
    check_row(operator, "weight", weight, x)
    check_row(operator, "bias", bias, x)


def _statistics(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype or x.dtype)


def _per_row(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:-1], dtype=_statistics(x))


def _dropped(mask: Tensor | None, x: Tensor) -> Tensor:
    return x.new_empty(0 if mask is None else x.shape)


def _of(parameter: Tensor | None, x: Tensor) -> Tensor:
    return x.new_empty(0, dtype=_statistics(x)) if parameter is None else parameter.new_empty(parameter.shape)


RMS_NORM_BACKWARD = define(
    "rms_norm_backward(Tensor gradient, Tensor x, Tensor? weight, Tensor inverse, Tensor? of_sum, float offset,"
    " Tensor? mask=None, float scale=1.0) -> (Tensor, Tensor, Tensor)",
    _rms_norm_backward,
    lambda gradient, x, weight, inverse, of_sum, offset, mask=None, scale=1.0: (
        _like(x),
        _dropped(mask, x),
        _of(weight, x),
    ),
    family=NORMS,
)
LAYER_NORM_BACKWARD = define(
    "layer_norm_backward(Tensor gradient, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor inverse,"
    " Tensor? of_sum, Tensor? mask=None, float scale=1.0) -> (Tensor, Tensor, Tensor, Tensor)",
    _layer_norm_backward,
    lambda gradient, x, weight, bias, mean, inverse, of_sum, mask=None, scale=1.0: (
        _like(x),
        _dropped(mask, x),
        _of(weight, x),
        _of(bias, x),
    ),
    family=NORMS,
)


def _save_rms(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _, ctx.offset, _, _ = inputs
    _save(ctx, x, weight, None, None, output)
    ctx.scale = 1.0


def _save_rms_of_sum(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, weight, _, ctx.offset, _, mask, ctx.scale, _ = inputs
    _save(ctx, output[1], weight, None, mask, output)


def _save_layer(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, _, _ = inputs
    _save(ctx, x, weight, bias, None, output)
    ctx.scale = 1.0


def _save_layer_of_sum(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, weight, bias, _, mask, ctx.scale, _ = inputs
    _save(ctx, output[1], weight, bias, mask, output)


def _save(
    ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, mask: Tensor | None, output: tuple[Tensor, ...]
) -> None:
    """x: what is normalized. Of the output, y and perhaps the sum have gradients, statistics follow."""
    sums = 1 + (x is output[1])
    ctx.mark_non_differentiable(*output[sums:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, bias, mask, *output[sums:])


def _of_rms(ctx: Any, gradient: Tensor | None, of_sum: Tensor | None = None) -> tuple[Tensor | None, ...]:
    """The gradients of x, of what was dropped out, of weight."""
    x, weight, _, mask, inverse = ctx.saved_tensors
    gradient = torch.zeros_like(x) if gradient is None else gradient
    given = () if mask is None else (mask, ctx.scale)
    found: tuple[Tensor, ...] = RMS_NORM_BACKWARD(gradient, x, weight, inverse, of_sum, ctx.offset, *given)
    of_x, dropped, of_weight = found
    return of_x, of_x if mask is None else dropped, None if weight is None else of_weight


def _rms_alone(ctx: Any, gradient: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    of_x, _dropped, of_weight = _of_rms(ctx, gradient)
    return of_x, of_weight, None, None, None, None


def _rms_of_sum(ctx: Any, gradient: Tensor | None, of_sum: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    of_residual, of_x, of_weight = _of_rms(ctx, gradient, of_sum)
    return of_x, of_residual, of_weight, *[None] * 6


def _of_layer(ctx: Any, gradient: Tensor | None, of_sum: Tensor | None = None) -> tuple[Tensor | None, ...]:
    """The gradients of x, of what was dropped out, of weight and bias."""
    x, weight, bias, mask, *statistics = ctx.saved_tensors
    gradient = torch.zeros_like(x) if gradient is None else gradient
    given = () if mask is None else (mask, ctx.scale)
    found: tuple[Tensor, ...] = LAYER_NORM_BACKWARD(gradient, x, weight, bias, *statistics, of_sum, *given)
    of_x, dropped, of_weight, of_bias = found
    rows = None if weight is None else of_weight, None if bias is None else of_bias
    return of_x, of_x if mask is None else dropped, *rows


def _layer_alone(ctx: Any, gradient: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    of_x, _dropped, *rows = _of_layer(ctx, gradient)
    return of_x, *rows, None, None


def _layer_of_sum(ctx: Any, gradient: Tensor | None, of_sum: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    of_residual, of_x, *rows = _of_layer(ctx, gradient, of_sum)
    return of_x, of_residual, *rows, *[None] * 4


RMS_NORM = define(
    "rms_norm(Tensor x, Tensor? weight, float epsilon, float offset, bool round_first, ScalarType? dtype=None)"
    " -> (Tensor, Tensor)",
    _rms_norm,
    lambda x, weight, epsilon, offset, round_first, dtype=None: (_like(x, dtype), _per_row(x)),
    save=_save_rms,
    backward=_rms_alone,
    family=NORMS,
)
ADD_RMS_NORM = define(
    "add_rms_norm(Tensor x, Tensor residual, Tensor? weight, float epsilon, float offset, bool round_first,"
    " Tensor? mask=None, float scale=1.0, ScalarType? dtype=None) -> (Tensor, Tensor, Tensor)",
    _add_rms_norm,
    lambda x, residual, weight, epsilon, offset, round_first, mask=None, scale=1.0, dtype=None: (
        _like(x, dtype),
        _like(x),
        _per_row(x),
    ),
    save=_save_rms_of_sum,
    backward=_rms_of_sum,
    family=NORMS,
)
LAYER_NORM = define(
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, float epsilon, ScalarType? dtype=None)"
    " -> (Tensor, Tensor, Tensor)",
    _layer_norm,
    lambda x, weight, bias, epsilon, dtype=None: (_like(x, dtype), _per_row(x), _per_row(x)),
    save=_save_layer,
    backward=_layer_alone,
    family=NORMS,
)
ADD_LAYER_NORM = define(
    "add_layer_norm(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float epsilon, Tensor? mask=None,"
    " float scale=1.0, ScalarType? dtype=None) -> (Tensor, Tensor, Tensor, Tensor)",
    _add_layer_norm,
    lambda x, residual, weight, bias, epsilon, mask=None, scale=1.0, dtype=None: (
        _like(x, dtype),
        _like(x),
        _per_row(x),
        _per_row(x),
    ),
    save=_save_layer_of_sum,
    backward=_layer_of_sum,
    family=NORMS,
)
