"""Linear layers whose weights have 8 or 4 bits, by groups of neighboring inputs, in operators of torch.

    quantize_weight      weight -> values, scales, zeros    weight is about (value - zero) * scale, by groups
    dequantize_weight    (value - zero) * scale
    quantized_linear     x @ that.T + bias

values, scales and zeros are as in `graphopt.cuda_ext.quantized.Quantized`, on the CPU and on GPUs: values int8
[outputs, inputs], or of 4 bits uint8 [outputs, inputs / 2], where byte j of a group holds its element j in the low four
bits and j + group / 2 in the high ones; scales and zeros float32 [outputs, groups]. Zeros that are not
given are 0, or 8 where bits are 4.
x: [..., inputs], bias: [outputs]. Nothing is rounded in between: sums are float32, of float64 in float64.
"""

import torch
from torch import Tensor

from graphopt.cuda_ext import reference


def dequantize_weight(values: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, dtype: torch.dtype) -> Tensor:
    return reference.dequantized(values, scales, zeros, bits).to(dtype)


def quantized_linear(
    x: Tensor, values: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, bits: int
) -> Tensor:
    return reference.quantized_linear(x, values, scales, zeros, bits, bias)
