"""Numbers of int8 or float8 with scales, and their products, in operators of torch.

    quantize_rows      values and a scale of each row: a token's activations, an output's weights
    quantize_tensor    values and one scale
    scaled_mm          (x @ weight.T) * x_scales * weight_scales + bias
    dynamic_linear     x @ weight.T + bias, of weights that are quantized and x that becomes so, by rows

values: int8, float8_e4m3fn or float8_e5m2, x is about values * scales: as in
`graphopt.triton_kernels.quantization.reference`. x: [..., inputs], weight: [outputs, inputs]; scales: float32, of x
[...] or [] for all, of the weight [outputs] or []; bias: [outputs]. Sums of products of int8 are exact, and those of
float8, which float32 holds exactly, are float32; they become `dtype` last.
"""

import torch
from torch import Tensor

from graphopt.triton_kernels.quantization.reference import LARGEST, ratios, rows_in, scale_of


def quantize_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    found, scales = rows_in(x, LARGEST[dtype])
    return rounded(found, dtype), scales


def quantize_tensor(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    wide = x.float()
    largest = wide.abs().amax() if x.numel() else wide.new_zeros(())
    scale = scale_of(largest, LARGEST[dtype])
    return rounded(ratios(wide, scale, LARGEST[dtype]), dtype), scale


def rounded(ratios: Tensor, dtype: torch.dtype) -> Tensor:
    """To the nearest number of the format, ties to even."""
    return (ratios.round() if dtype == torch.int8 else ratios).to(dtype)


def scaled_mm(
    x: Tensor, x_scales: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    exact = torch.float64 if x.dtype == torch.int8 else torch.float32
    return scaled((x.to(exact) @ weight.to(exact).T).float(), x_scales, weight_scales, bias, dtype)


def scaled(sums: Tensor, x_scales: Tensor, weight_scales: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    y = sums * (x_scales[..., None] if x_scales.dim() else x_scales) * weight_scales
    return (y if bias is None else y + bias).to(dtype)
