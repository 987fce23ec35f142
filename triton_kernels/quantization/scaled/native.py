"""Products of int8 by torch's own for the CPU; functions have the arguments and results of those in `reference`."""

import torch
from torch import Tensor

from graphopt._torch import int_mm
from graphopt.triton_kernels.launch import rows_of
from graphopt.triton_kernels.quantization.scaled import reference

quantize_rows, quantize_tensor = reference.quantize_rows, reference.quantize_tensor


def scaled_mm(
    x: Tensor, x_scales: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    sums = int_mm(rows_of(x), weight.T).float().view(*x.shape[:-1], len(weight))
    return reference.scaled(sums, x_scales, weight_scales, bias, dtype)
