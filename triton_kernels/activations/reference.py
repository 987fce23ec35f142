"""Gated and biased activations in operators of torch, in float32 or, of float64, in float64.

    gated              act(gate) * up            SwiGLU and GeGLU: Shazeer 2020, arXiv:2002.05202
    bias_activation    act(x + bias)

act is "silu" (x * sigmoid(x)), "gelu" (x * Phi(x), Hendrycks and Gimpel 2016, arXiv:1606.08415) or "gelu_tanh" (the
latter's approximation by tanh). All tensors are [..., width], a bias is [width]; nothing is rounded in between.
"""

import torch
from torch import Tensor

from graphopt.cuda_ext import reference
from graphopt.cuda_ext.activations import ACTIVATIONS
from graphopt.cuda_ext.reference import bias_activation, gated, gated_backward

__all__ = ["ACTIVATIONS", "bias_activation", "bias_activation_backward", "gated", "gated_backward"]


def bias_activation_backward(
    gradient: Tensor, x: Tensor, bias: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    """The gradients of x and bias, the latter empty if there is none."""
    of_x, of_bias = reference.bias_activation_backward(gradient, x, bias, activation)
    empty = x.new_empty(0, dtype=torch.promote_types(x.dtype, torch.float32))
    return of_x, empty if of_bias is None else of_bias
