"""How floating numbers that share a scale become numbers of few bits, in operators of torch.

The scale is the largest magnitude over the largest number of the format (for integers of b bits 2^(b-1) - 1, so that
the range is symmetric), at least 2^-126: the inverse of that is finite. Numbers that share a scale with one that is not
finite have the scale nan and the value 0, so that all of them are read as nan.
"""

import torch
from torch import Tensor

from graphopt.triton_kernels.launch import rows_of

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
# The largest number of each format; for float8: Micikevicius et al. 2022, arXiv:2209.05433.
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
_LEAST_SCALE = 2.0**-126


def scale_of(largest: Tensor, limit: float) -> Tensor:
    """The scale of numbers of magnitude up to `largest`, which may be infinite or nan; float32."""
    return torch.where(largest < torch.inf, (largest / limit).clamp(min=_LEAST_SCALE), torch.nan)


def ratios(x: Tensor, scales: Tensor, limit: float) -> Tensor:
    """x over its scales, at most `limit` of either sign: float32, not yet rounded."""
    inverse = torch.where(scales.isnan(), 0, 1 / scales)
    return torch.where(scales.isnan(), 0, x.float() * inverse).clamp(-limit, limit)


def rows_in(x: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """`ratios` of rows x [..., width], and a scale [...] for each."""
    wide = x.float()
    largest = wide.abs().amax(-1) if x.shape[-1] else wide.new_zeros(x.shape[:-1])
    scales = scale_of(largest, limit)
    return ratios(wide, scales[..., None], limit), scales


def sum_of_rows(x: Tensor) -> Tensor:
    """The sum over all dimensions but the last, in float32 at least: the gradient of a bias."""
    return rows_of(x).sum(0, dtype=torch.promote_types(x.dtype, torch.float32))
