"""Activations in one pass over memory: of gated units (SwiGLU, GeGLU), and after a bias; forward and backward.

Numbers are float32 or bfloat16, arithmetic is float32. Each function does what that of the same name in
`graphopt.cuda_ext.reference` does, and raises ValueError that names the argument which does not fit.
"""

import torch

from graphopt.cuda_ext import reference
from graphopt.cuda_ext.arguments import ELEMENTS, check, check_choice
from graphopt.cuda_ext.library import library

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
"""In the order in which activations.cpp numbers them."""

_SOURCE = "activations.cpp"
_BF16 = torch.bfloat16


def gated(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """activation(gate) * up, of [rows, width]: SwiGLU with "silu", GeGLU with "gelu" or "gelu_tanh".

    Rows may lie any distance apart, so that gate and up may be halves of one tensor; those of the result are dense.
    """
    _check_gated(gate, up, activation)
    native = library(_SOURCE)
    if native is None:
        return reference.gated(gate, up, activation)
    y = gate.new_empty(gate.shape)
    strides = gate.stride(0), up.stride(0)
    native.call("gated", gate, up, y, *gate.shape, *strides, ACTIVATIONS.index(activation), gate.dtype == _BF16)
    return y


def gated_backward(
    dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dgate, dup) of `gated`."""
    _check_gated(gate, up, activation)
    check("dy", dy, gate.shape, (gate.dtype,))
    native = library(_SOURCE)
    if native is None:
        return reference.gated_backward(dy, gate, up, activation)
    dgate, dup = gate.new_empty(gate.shape), gate.new_empty(gate.shape)
    strides = gate.stride(0), up.stride(0)
    types = ACTIVATIONS.index(activation), gate.dtype == _BF16
    native.call("gated_backward", dy, gate, up, dgate, dup, *gate.shape, *strides, *types)
    return dgate, dup


def bias_activation(x: torch.Tensor, bias: torch.Tensor | None, activation: str) -> torch.Tensor:
    """activation(x + bias), of x [rows, width] and bias [width], which has the dtype of x or is float32."""
    _check_biased(x, bias, activation)
    native = library(_SOURCE)
    if native is None:
        return reference.bias_activation(x, bias, activation)
    y = torch.empty_like(x)
    types = (x.dtype == _BF16, bias is not None and bias.dtype == _BF16)
    native.call("bias_activation", x, bias, y, *x.shape, ACTIVATIONS.index(activation), *types)
    return y


def bias_activation_backward(
    dy: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None, activation: str
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(dx, dbias or None) of `bias_activation`."""
    _check_biased(x, bias, activation)
    check("dy", dy, x.shape, (x.dtype,))
    native = library(_SOURCE)
    if native is None:
        return reference.bias_activation_backward(dy, x, bias, activation)
    dx, dbias = torch.empty_like(x), None if bias is None else torch.empty_like(bias)
    types = (x.dtype == _BF16, bias is not None and bias.dtype == _BF16)
    tensors = (dy, x, bias, dx, dbias)
    native.call("bias_activation_backward", *tensors, *x.shape, ACTIVATIONS.index(activation), *types)
    return dx, dbias


def _check_gated(gate: torch.Tensor, up: torch.Tensor, activation: str) -> None:
    check_choice("activation", activation, ACTIVATIONS)
    check("gate", gate, (None, None), ELEMENTS, is_contiguous=False)
    check("up", up, gate.shape, (gate.dtype,), is_contiguous=False)


def _check_biased(x: torch.Tensor, bias: torch.Tensor | None, activation: str) -> None:
    check_choice("activation", activation, ACTIVATIONS)
    check("x", x, (None, None), ELEMENTS)
    if bias is not None:
        check("bias", bias, x.shape[1:], (x.dtype, torch.float32))
