"""Tokens by expert and back in native code; functions have the arguments and results of those in `reference`."""

import torch
from torch import Tensor

from graphopt.cuda_ext import experts as native
from graphopt.triton_kernels.experts.permutation import reference
from graphopt.triton_kernels.launch import rows_of


def sort_by_expert(chosen: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    if not native.is_built():
        return reference.sort_by_expert(chosen, experts)
    order, places, ends = native.sort_by_expert(chosen.reshape(-1).contiguous(), experts)
    return order, places.view(chosen.shape), ends


def permute_tokens(x: Tensor, places: Tensor) -> Tensor:
    if not native.is_built():
        return reference.permute_tokens(x, places)
    return native.permute_tokens(rows_of(x).contiguous(), places.contiguous())


def unpermute_tokens(rows: Tensor, weights: Tensor | None, places: Tensor) -> Tensor:
    if not native.is_built():
        return reference.unpermute_tokens(rows, weights, places)
    return native.unpermute_tokens(rows_of(rows).contiguous(), _floats(weights), places.contiguous())


def unpermute_tokens_backward(gradient: Tensor, rows: Tensor, weights: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    if not native.is_built():
        return reference.unpermute_tokens_backward(gradient, rows, weights, places)
    wide = weights.to(torch.float32).contiguous()
    given = (rows_of(gradient).contiguous(), rows_of(rows).contiguous(), wide, places.contiguous())
    of_rows, of_weights = native.unpermute_tokens_backward(*given)
    return of_rows, of_weights.to(weights.dtype)


def _floats(weights: Tensor | None) -> Tensor | None:
    return None if weights is None else weights.to(torch.float32).contiguous()
