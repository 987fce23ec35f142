"""The operators of numbers with scales. What they compute is written in `reference`."""

from typing import Any

import torch
from torch import Tensor

from graphopt.triton_kernels.choice import OF_CPU, OF_TRITON, Family
from graphopt.triton_kernels.quantization.reference import FLOAT8, LARGEST, sum_of_rows
from graphopt.triton_kernels.registration import check_floating, check_row, define, describe

_FOLDER = "quantization.scaled"
INT8 = Family(_FOLDER, 2**31 - 1, OF_CPU | {torch.int8}, OF_TRITON | {torch.int8}, of_models=True)
# Ada Lovelace is the first to convert to float8, and to multiply it.
FLOAT = Family(_FOLDER, 2**31 - 1, triton=OF_TRITON | {*FLOAT8}, capability=(8, 9), of_models=True)


def _quantize_rows(x: Tensor, dtype: torch.dtype) -> Any:
    check_floating("quantize_rows", "x", x)
    return _family("quantize_rows", "dtype", dtype).run("quantize_rows", x, dtype)


def _quantize_tensor(x: Tensor, dtype: torch.dtype) -> Any:
    check_floating("quantize_tensor", "x", x)
    return _family("quantize_tensor", "dtype", dtype).run("quantize_tensor", x, dtype)


def _scaled_mm(
    x: Tensor, x_scales: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Any:
    operator = "scaled_mm"
    family = _family(operator, "x", x.dtype)
    if x.dim() < 1:
        raise ValueError(f"{operator}: x is {describe(x)}, not [..., inputs]")
    _check_weight(operator, weight, x)
    if (weight.dtype == torch.int8) != (x.dtype == torch.int8):
        raise ValueError(f"{operator}: weight is {describe(weight)}, which is not multiplied with x, {describe(x)}")
    _check_scales(operator, "x_scales", x_scales, x.shape[:-1], x.device)
    _check_scales(operator, "weight_scales", weight_scales, weight.shape[:1], x.device)
    if not dtype.is_floating_point or dtype in FLOAT8:
        raise ValueError(f"{operator}: dtype is {dtype}, not floating of 16 bits or more")
    check_row(operator, "bias", bias, x.new_empty(0, dtype=dtype), len(weight))
    return family.run(operator, x, x_scales, weight.contiguous(), weight_scales, bias, dtype)


def _dynamic_linear(x: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor | None) -> Tensor:
    check_floating("dynamic_linear", "x", x)
    _check_weight("dynamic_linear", weight, x)
    values, scales = QUANTIZE_ROWS(x, weight.dtype)
    y: Tensor = SCALED_MM(values, scales, weight, weight_scales, bias, x.dtype)
    return y


def _family(operator: str, name: str, dtype: torch.dtype) -> Family:
    """Raises ValueError where there is none for a dtype, which argument `name` says."""
    if dtype not in LARGEST:
        raise ValueError(f"{operator}: {name} is {dtype}, not {', '.join(map(str, LARGEST))}")
    return FLOAT if dtype in FLOAT8 else INT8


def _check_weight(operator: str, weight: Tensor, x: Tensor) -> None:
    _family(operator, "weight", weight.dtype)
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1] or weight.device != x.device:
        wanted = f"[outputs, {x.shape[-1]}] on {x.device}"
        raise ValueError(f"{operator}: weight is {describe(weight)}, not {wanted}")


def _check_scales(operator: str, name: str, scales: Tensor, shape: torch.Size, device: torch.device) -> None:
    if scales.shape not in (shape, ()) or scales.dtype != torch.float32 or scales.device != device:
        raise ValueError(f"{operator}: {name} are {describe(scales)}, not float32 {list(shape)} or [] on {device}")


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weight, weight_scales, bias = inputs
    if weight_scales.requires_grad:
        raise ValueError("dynamic_linear: weight_scales are constants, and require a gradient: detach them")
    ctx.save_for_backward(weight, weight_scales)
    ctx.of_bias = None if bias is None else bias.dtype


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """As if x had not been rounded: the straight-through estimator (Bengio et al. 2013, arXiv:1308.3432)."""
    weight, weight_scales = ctx.saved_tensors
    of_x = of_bias = None
    if ctx.needs_input_grad[0]:
        of_x = (gradient * weight_scales).to(gradient.dtype) @ weight.to(gradient.dtype)
    if ctx.needs_input_grad[3]:
        of_bias = sum_of_rows(gradient).to(ctx.of_bias)
    return of_x, None, None, of_bias


QUANTIZE_ROWS = define(
    "quantize_rows(Tensor x, ScalarType dtype) -> (Tensor, Tensor)",
    _quantize_rows,
    lambda x, dtype: (x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[:-1], dtype=torch.float32)),
)
QUANTIZE_TENSOR = define(
    "quantize_tensor(Tensor x, ScalarType dtype) -> (Tensor, Tensor)",
    _quantize_tensor,
    lambda x, dtype: (x.new_empty(x.shape, dtype=dtype), x.new_empty((), dtype=torch.float32)),
)
SCALED_MM = define(
    "scaled_mm(Tensor x, Tensor x_scales, Tensor weight, Tensor weight_scales, Tensor? bias, ScalarType dtype)"
    " -> Tensor",
    _scaled_mm,
    lambda x, x_scales, weight, weight_scales, bias, dtype: x.new_empty(*x.shape[:-1], weight.shape[0], dtype=dtype),
)
DYNAMIC_LINEAR = define(
    "dynamic_linear(Tensor x, Tensor weight, Tensor weight_scales, Tensor? bias) -> Tensor",
    _dynamic_linear,
    lambda x, weight, *_: x.new_empty(*x.shape[:-1], weight.shape[0]),
    save=_save,
    backward=_backward,
)
