"""The operators of weights of few bits. What they compute is written in `reference`."""

from typing import Any

import torch
from torch import Tensor

from graphopt.cuda_ext import reference
from graphopt.triton_kernels.choice import OF_CPU, OF_TRITON, Family
from graphopt.triton_kernels.quantization.reference import sum_of_rows
from graphopt.triton_kernels.registration import check_bits, check_floating, check_row, define, describe

_BYTES = frozenset({torch.int8, torch.uint8})
FAMILY = Family(
    "quantization.weights", widest=2**31 - 1, native=OF_CPU | _BYTES, triton=OF_TRITON | _BYTES, of_models=True
)
BITS = (8, 4)


def _quantize_weight(weight: Tensor, bits: int, group: int, has_zeros: bool) -> tuple[Tensor, Tensor, Tensor]:
    """In operators of torch on any device: it is done once."""
    operator = "quantize_weight"
    check_floating(operator, "weight", weight)
    check_bits(operator, bits, BITS)
    if weight.dim() != 2:
        raise ValueError(f"{operator}: weight is {describe(weight)}, not [outputs, inputs]")
    if group < 1 or weight.shape[1] % group or (bits == 4 and group % 2):
        what = "an even divisor" if bits == 4 else "a divisor"
        raise ValueError(f"{operator}: group is {group}, not {what} of {weight.shape[1]} inputs")
    return reference.quantized(weight, bits, group, has_zeros)


def _dequantize_weight(values: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, dtype: torch.dtype) -> Any:
    operator = "dequantize_weight"
    _check(operator, values, scales, zeros, bits)
    if not dtype.is_floating_point:
        raise ValueError(f"{operator}: dtype is {dtype}, not floating")
    return FAMILY.run(operator, *_side_by_side(values, scales, zeros), bits, dtype)


def _quantized_linear(
    x: Tensor, values: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, bits: int
) -> Any:
    operator = "quantized_linear"
    check_floating(operator, "x", x)
    inputs = _check(operator, values, scales, zeros, bits)
    if x.shape[-1] != inputs or x.device != values.device:
        raise ValueError(f"{operator}: x is {describe(x)}, not [..., {inputs}] on {values.device}")
    check_row(operator, "bias", bias, x, len(values))
    return FAMILY.run(operator, x, *_side_by_side(values, scales, zeros), bias, bits)


def _check(operator: str, values: Tensor, scales: Tensor, zeros: Tensor | None, bits: int) -> int:
    """Raises ValueError that names the argument which does not fit; else gives how many inputs there are."""
    check_bits(operator, bits, BITS)
    dtype = torch.int8 if bits == 8 else torch.uint8
    if values.dim() != 2 or values.dtype != dtype:
        raise ValueError(f"{operator}: values are {describe(values)}, not {dtype} [outputs, bytes]")
    outputs, inputs = len(values), values.shape[1] * 8 // bits
    wanted = f"float32 [{outputs}, groups] on {values.device}"
    if scales.dim() != 2 or len(scales) != outputs or not _is_alike(scales, values.device):
        raise ValueError(f"{operator}: scales are {describe(scales)}, not {wanted}")
    groups = scales.shape[1]
    if inputs and (not groups or inputs % groups or (bits == 4 and inputs // groups % 2)):
        even = "even " if bits == 4 else ""
        raise ValueError(
            f"{operator}: scales have {groups} groups, which do not divide {inputs} inputs into {even}parts"
        )
    if zeros is not None and (zeros.shape != scales.shape or not _is_alike(zeros, values.device)):
        raise ValueError(f"{operator}: zeros are {describe(zeros)}, not {wanted.replace('groups', str(groups))}")
    return inputs


def _is_alike(x: Tensor, device: torch.device) -> bool:
    return x.dtype == torch.float32 and x.device == device


def _side_by_side(values: Tensor, scales: Tensor, zeros: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    return values.contiguous(), scales.contiguous(), None if zeros is None else zeros.contiguous()


def _of_weight(weight: Tensor, bits: int, group: int, has_zeros: bool) -> tuple[Tensor, Tensor, Tensor]:
    outputs, inputs = weight.shape
    values = weight.new_empty(outputs, inputs * bits // 8, dtype=torch.int8 if bits == 8 else torch.uint8)
    scales, zeros = (weight.new_empty(outputs, inputs // group, dtype=torch.float32) for _ in range(2))
    return values, scales, zeros


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, values, scales, zeros, bias, bits = inputs
    if scales.requires_grad or (zeros is not None and zeros.requires_grad):
        raise ValueError("quantized_linear: scales and zeros are constants, and one requires a gradient: detach it")
    ctx.save_for_backward(values, scales, zeros)
    ctx.bits, ctx.of_bias = bits, None if bias is None else bias.dtype


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """That of x by a product with the weights made floats of its dtype, which is once for all rows."""
    of_x = of_bias = None
    if ctx.needs_input_grad[0]:
        of_x = gradient @ DEQUANTIZE_WEIGHT(*ctx.saved_tensors, ctx.bits, gradient.dtype)
    if ctx.needs_input_grad[4]:
        of_bias = sum_of_rows(gradient).to(ctx.of_bias)
    return of_x, None, None, None, of_bias, None


QUANTIZE_WEIGHT = define(
    "quantize_weight(Tensor weight, int bits, int group, bool has_zeros) -> (Tensor, Tensor, Tensor)",
    _quantize_weight,
    _of_weight,
)
DEQUANTIZE_WEIGHT = define(
    "dequantize_weight(Tensor values, Tensor scales, Tensor? zeros, int bits, ScalarType dtype) -> Tensor",
    _dequantize_weight,
    lambda values, scales, zeros, bits, dtype: values.new_empty(
        values.shape[0], values.shape[1] * 8 // bits, dtype=dtype
    ),
    family=FAMILY,
)
QUANTIZED_LINEAR = define(
    "quantized_linear(Tensor x, Tensor values, Tensor scales, Tensor? zeros, Tensor? bias, int bits) -> Tensor",
    _quantized_linear,
    lambda x, values, *_: x.new_empty(*x.shape[:-1], values.shape[0]),
    save=_save,
    backward=_backward,
    family=FAMILY,
)
