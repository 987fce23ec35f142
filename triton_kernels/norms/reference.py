"""Norms of rows in operators of torch, in float32 or, of float64, in float64.

    RMSNorm     y = x / sqrt(mean(x^2) + epsilon) * (offset + weight)         Zhang and Sennrich 2019, arXiv:1910.07467
    LayerNorm   y = (x - mean(x)) / sqrt(var(x) + epsilon) * weight + bias    Ba et al. 2016, arXiv:1607.06450

What is called `inverse` is the reciprocal of the root. All functions take x as [..., width], and weight and bias as
[width] or None; statistics are [...].
"""

import torch
from torch import Tensor


def rms_norm(
    x: Tensor, weight: Tensor | None, epsilon: float, offset: float, round_first: bool
) -> tuple[Tensor, Tensor]:
    """y and inverse. round_first: whether the normalized row is rounded to the dtype of x before it is weighted."""
    wide = _wide(x)
    inverse = torch.rsqrt(wide.square().mean(-1) + epsilon)
    y = wide * inverse.unsqueeze(-1)
    if round_first:
        y = y.to(x.dtype).to(y.dtype)
    return _scaled(y, weight, offset).to(x.dtype), inverse


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, epsilon: float, offset: float, round_first: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the sum of x and residual, of which it is the norm, and inverse."""
    total = x.contiguous() + residual
    y, inverse = rms_norm(total, weight, epsilon, offset, round_first)
    return y, total, inverse


def rms_norm_backward(
    gradient: Tensor, x: Tensor, weight: Tensor | None, inverse: Tensor, of_sum: Tensor | None, offset: float
) -> tuple[Tensor, Tensor]:
    """The gradients of x, to which `of_sum` is added, and of weight, empty if there is none."""
    wide, normalized = _wide(gradient), _wide(x) * inverse.unsqueeze(-1)
    inner = _scaled(wide, weight, offset)
    mean = (inner * normalized).mean(-1, keepdim=True)
    of_x = (inner - normalized * mean) * inverse.unsqueeze(-1)
    return _plus(of_x, of_sum).to(x.dtype), _summed(wide * normalized, weight)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    """y, mean and inverse."""
    wide = _wide(x)
    mean = wide.mean(-1)
    centered = wide - mean.unsqueeze(-1)
    inverse = torch.rsqrt(centered.square().mean(-1) + epsilon)
    y = _scaled(centered * inverse.unsqueeze(-1), weight, 0.0)
    return (y if bias is None else y + bias).to(x.dtype), mean, inverse


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, epsilon: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, the sum of x and residual, of which it is the norm, mean and inverse."""
    total = x.contiguous() + residual
    y, mean, inverse = layer_norm(total, weight, bias, epsilon)
    return y, total, mean, inverse


def layer_norm_backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    inverse: Tensor,
    of_sum: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, to which `of_sum` is added, of weight and of bias, each empty if there is none."""
    wide = _wide(gradient)
    normalized = (_wide(x) - mean.unsqueeze(-1)) * inverse.unsqueeze(-1)
    inner = _scaled(wide, weight, 0.0)
    projected = normalized * (inner * normalized).mean(-1, keepdim=True)
    of_x = (inner - inner.mean(-1, keepdim=True) - projected) * inverse.unsqueeze(-1)
    return _plus(of_x, of_sum).to(x.dtype), _summed(wide * normalized, weight), _summed(wide, bias)


def _wide(x: Tensor) -> Tensor:
    return x.contiguous().to(torch.promote_types(x.dtype, torch.float32))


def _scaled(x: Tensor, weight: Tensor | None, offset: float) -> Tensor:
    return x if weight is None else x * (offset + weight.to(x.dtype))


def _plus(x: Tensor, other: Tensor | None) -> Tensor:
    return x if other is None else x + other


def _summed(x: Tensor, like: Tensor | None) -> Tensor:
    """The sum over all rows, in the dtype of `like`."""
    return x.new_empty(0) if like is None else x.reshape(-1, x.shape[-1]).sum(0).to(like.dtype)
