"""Experts of a mixture: which of them a token goes to, tokens by expert, and back with the weighted sum.

What the functions compute is written where they are operators: `graphopt.triton_kernels.experts`, in `routing` and
`permutation`. Tensors are contiguous; numbers are float32 or bfloat16, arithmetic is float32. Functions raise
ValueError that names the argument which does not fit, and are for where `is_built`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from graphopt.cuda_ext.arguments import ELEMENTS, FLOAT32, check
from graphopt.cuda_ext.library import Library, library

_SOURCE = "experts.cpp"
_INT64 = (torch.int64,)


class Weighing(NamedTuple):
    """How scores come from logits, "softmax" or "sigmoid", and weights from those of the experts chosen.

    They are scale * s / (epsilon + sum of s) if normalized, else scale * s.
    """

    scores: str
    normalized: bool
    epsilon: float
    scale: float


def is_built() -> bool:
    """Whether there is native code here; it is built at the first call."""
    return library(_SOURCE) is not None


def route(
    logits: Tensor, bias: Tensor | None, top_k: int, weighing: Weighing, groups: int, top_groups: int
) -> tuple[Tensor, Tensor]:
    """Weights, float32, and numbers of experts, int64: both [tokens, top_k]."""
    check("logits", logits, (None, None), ELEMENTS)
    if bias is not None:
        check("bias", bias, logits.shape[1:], FLOAT32)
    weights = logits.new_empty(len(logits), top_k, dtype=torch.float32)
    chosen = torch.empty_like(weights, dtype=torch.int64)
    options = (*_options(weighing), groups, top_groups, _is_bf16(logits))
    _native().call("route", logits, bias, weights, chosen, *logits.shape, top_k, *options)
    return weights, chosen


def route_backward(logits: Tensor, gradient: Tensor, chosen: Tensor, weighing: Weighing) -> Tensor:
    """The gradient of logits, where that of the weights is float32 `gradient` [tokens, top_k]."""
    check("logits", logits, (None, None), ELEMENTS)
    check("chosen", chosen, (len(logits), None), _INT64)
    check("gradient", gradient, chosen.shape, FLOAT32)
    _check_range("chosen", chosen, logits.shape[1])
    of_logits = torch.empty_like(logits)
    tensors, options = (logits, gradient, chosen, of_logits), _options(weighing)
    _native().call("route_backward", *tensors, *logits.shape, chosen.shape[1], *options, _is_bf16(logits))
    return of_logits


def _options(weighing: Weighing) -> tuple[bool, bool, float, float]:
    """As the native code has them."""
    return weighing.scores == "sigmoid", weighing.normalized, float(weighing.epsilon), float(weighing.scale)


def sort_by_expert(chosen: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of int64 [n]: which stands where and where each stands, both int64 [n]; ends of experts, int32 [experts]."""
    check("chosen", chosen, (None,), _INT64)
    order, places = torch.empty_like(chosen), torch.empty_like(chosen)
    ends = chosen.new_empty(experts, dtype=torch.int32)
    _native().call("sort_by_expert", chosen, order, places, ends, len(chosen), experts)
    return order, places, ends


def permute_tokens(x: Tensor, places: Tensor) -> Tensor:
    """x [tokens, width] -> [tokens * top_k, width], by int64 places [tokens, top_k]."""
    check("x", x, (None, None), ELEMENTS)
    _check_places(places, (len(x), None))
    rows = x.new_empty(places.numel(), x.shape[1])
    _native().call("permute_tokens", x, places, rows, *places.shape, x.shape[1] * x.element_size())
    return rows


def unpermute_tokens(rows: Tensor, weights: Tensor | None, places: Tensor) -> Tensor:
    """rows [tokens * top_k, width] -> [tokens, width], by float32 weights [tokens, top_k], or 1."""
    check("rows", rows, (places.numel(), None), ELEMENTS)
    _check_places(places, (None, None))
    if weights is not None:
        check("weights", weights, places.shape, FLOAT32)
    y = rows.new_empty(len(places), rows.shape[1])
    _native().call("unpermute_tokens", rows, weights, places, y, *places.shape, rows.shape[1], _is_bf16(rows))
    return y


def unpermute_tokens_backward(gradient: Tensor, rows: Tensor, weights: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of rows and of weights."""
    check("rows", rows, (places.numel(), None), ELEMENTS)
    _check_places(places, (None, None))
    check("weights", weights, places.shape, FLOAT32)
    check("gradient", gradient, (len(places), rows.shape[1]), (rows.dtype,))
    of_rows, of_weights = torch.empty_like(rows), torch.empty_like(weights)
    tensors = (gradient, rows, weights, places, of_rows, of_weights)
    _native().call("unpermute_tokens_backward", *tensors, *places.shape, rows.shape[1], _is_bf16(rows))
    return of_rows, of_weights


def _native() -> Library:
    native = library(_SOURCE)
    assert native is not None, "asked for where it is not built"
    return native


def _is_bf16(tensor: Tensor) -> bool:
    return tensor.dtype == torch.bfloat16


def _check_places(places: Tensor, shape: tuple[int | None, ...]) -> None:
    check("places", places, shape, _INT64)
    _check_range("places", places, places.numel())


def _check_range(name: str, numbers: Tensor, end: int) -> None:
    if not numbers.numel():
        return
    lowest, highest = map(int, numbers.aminmax())
    if lowest < 0 or highest >= end:
        raise ValueError(f"{name} has {lowest if lowest < 0 else highest}, which is not from 0 to {end - 1}")
