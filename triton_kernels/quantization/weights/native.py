"""Weights of few bits by `graphopt.cuda_ext`; functions have the arguments and results of those in `reference`."""

from torch import Tensor

from graphopt.cuda_ext import quantized
from graphopt.triton_kernels.launch import rows_of
from graphopt.triton_kernels.quantization.weights import reference

_FEW = 64  # rows; for more it is faster to have the weights as floats, for a product of matrices

dequantize_weight = reference.dequantize_weight  # moves few bytes: torch's operators do


def quantized_linear(
    x: Tensor, values: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, bits: int
) -> Tensor:
    rows = rows_of(x).contiguous()
    if len(rows) > _FEW:
        return reference.quantized_linear(x, values, scales, zeros, bias, bits)
    held = quantized.Quantized(values, scales, zeros, bits)
    return quantized.linear(rows, held, bias).view(*x.shape[:-1], held.outputs)
