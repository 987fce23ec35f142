"""The mask of a dropout by itself, for operators that apply it along with what they compute.

It is drawn by torch, as by `torch.native_dropout`, so that the same seed gives the same numbers as in eager. It is the
one random operator: what applies it is pure, and may be computed again from the mask, which is saved.
"""

import torch
from torch import Tensor

from graphopt.triton_kernels.registration import check_floating, define


def _dropout_mask(x: Tensor, p: float) -> Tensor:
    """Bool, laid out as x: true with the probability 1 - p."""
    check_floating("dropout_mask", "x", x, 0)
    if not 0 <= p <= 1:
        raise ValueError(f"dropout_mask: p is {p}, not from 0 to 1")
    if not x.is_cpu:  # its kernel for GPUs draws in an order of its own
        return torch.native_dropout(x, p, True)[1]
    return torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - p)


DROPOUT_MASK = define(
    "dropout_mask(Tensor x, float p) -> Tensor",
    _dropout_mask,
    lambda x, p: torch.empty_like(x, dtype=torch.bool),
    save=lambda ctx, inputs, output: ctx.mark_non_differentiable(output),
    draws=True,
)
