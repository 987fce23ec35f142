"""Norms of rows by `graphopt.cuda_ext`; functions have the arguments and results of those in `reference`."""

import torch
from torch import Tensor

from graphopt.cuda_ext import norms


def rms_norm(
    x: Tensor, weight: Tensor | None, epsilon: float, offset: float, round_first: bool
) -> tuple[Tensor, Tensor]:
    y, _, inverse = _rms_norm(x, None, weight, epsilon, offset, round_first)
    return y, inverse


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, epsilon: float, offset: float, round_first: bool
) -> tuple[Tensor, Tensor, Tensor]:
    y, total, inverse = _rms_norm(x, residual, weight, epsilon, offset, round_first)
    assert total is not None
    return y, total.view(x.shape), inverse


def rms_norm_backward(
    gradient: Tensor, x: Tensor, weight: Tensor | None, inverse: Tensor, of_sum: Tensor | None, offset: float
) -> tuple[Tensor, Tensor]:
    others = None if of_sum is None else _rows(of_sum)
    of_x, of_weight = norms.rms_norm_backward(_rows(gradient), _rows(x), weight, inverse.reshape(-1), others, offset)
    return of_x.view(x.shape), _or_empty(of_weight, weight)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    y, _, mean, inverse = norms.layer_norm(_rows(x), weight, bias, epsilon)
    return y.view(x.shape), mean.clone().view(x.shape[:-1]), inverse.clone().view(x.shape[:-1])


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, epsilon: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y, total, mean, inverse = norms.layer_norm(_rows(x), weight, bias, epsilon, _rows(residual))
    assert total is not None
    statistics = (each.clone().view(x.shape[:-1]) for each in (mean, inverse))
    return y.view(x.shape), total.view(x.shape), *statistics  # type: ignore[return-value]


def layer_norm_backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    inverse: Tensor,
    of_sum: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    others = None if of_sum is None else _rows(of_sum)
    statistics = (mean.reshape(-1), inverse.reshape(-1))
    of_x, of_weight, of_bias = norms.layer_norm_backward(
        _rows(gradient), _rows(x), weight, *statistics, others, bias is not None
    )
    return of_x.view(x.shape), _or_empty(of_weight, weight), _or_empty(of_bias, bias)


def _rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, epsilon: float, offset: float, round_first: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    others = None if residual is None else _rows(residual)
    if not (round_first and weight is not None and x.dtype != torch.float32):
        y, total, inverse = norms.rms_norm(_rows(x), weight, epsilon, others, offset)
    else:
        y, total, inverse = norms.rms_norm(_rows(x), None, epsilon, others)
        y = (y * (offset + weight.float())).to(x.dtype)
    return y.view(x.shape), total, inverse.view(x.shape[:-1])


def _rows(x: Tensor) -> Tensor:
    return x.reshape(x.shape[:-1].numel(), x.shape[-1]).contiguous()


def _or_empty(gradient: Tensor | None, like: Tensor | None) -> Tensor:
    return torch.empty(0) if gradient is None or like is None else gradient.to(like.dtype)
