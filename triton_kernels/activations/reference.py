"""Gated and biased activations in operators of torch, in float32 or, of float64, in float64.

    gated              act(gate) * up            SwiGLU and GeGLU: Shazeer 2020, arXiv:2002.05202
    bias_activation    act(x + bias)

act is "silu" (x * sigmoid(x)), "gelu" (x * Phi(x), Hendrycks and Gimpel 2016, arXiv:1606.08415) or "gelu_tanh" (the
latter's approximation by tanh). All tensors are [..., width], a bias is [width]; nothing is rounded in between.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return (_activated(_wide(gate), activation) * _wide(up)).to(gate.dtype)


def gated_backward(gradient: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up."""
    wide, given = _wide(gradient), _wide(gate)
    of_gate = wide * _wide(up) * _derivative(given, activation)
    return of_gate.to(gate.dtype), (wide * _activated(given, activation)).to(up.dtype)


def bias_activation(x: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    return _activated(_biased(x, bias), activation).to(x.dtype)


def bias_activation_backward(
    gradient: Tensor, x: Tensor, bias: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    """The gradients of x and bias, the latter empty if there is none."""
    of_x = _wide(gradient) * _derivative(_biased(x, bias), activation)
    of_bias = of_x.new_empty(0) if bias is None else of_x.reshape(-1, x.shape[-1]).sum(0).to(bias.dtype)
    return of_x.to(x.dtype), of_bias


def _activated(x: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return F.silu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def _derivative(x: Tensor, activation: str) -> Tensor:
    if activation == "gelu":
        density = torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
        return 0.5 * (1 + torch.erf(x * math.sqrt(0.5))) + x * density
    # Both others are x * sigmoid(inner(x)).
    if activation == "silu":
        inner, slope = x, torch.ones_like(x)
    else:
        inner = 2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
        slope = 2 * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x * x)
    share = torch.sigmoid(inner)
    return share + x * share * (1 - share) * slope


def _biased(x: Tensor, bias: Tensor | None) -> Tensor:
    wide = _wide(x)
    return wide if bias is None else wide + bias.to(wide.dtype)


def _wide(x: Tensor) -> Tensor:
    return x.contiguous().to(torch.promote_types(x.dtype, torch.float32))
