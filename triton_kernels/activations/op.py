"""The operators of activations. What they compute is written in `reference`."""

from typing import Any

import torch
from torch import Tensor

from graphopt.nearest import nearest
from graphopt.triton_kernels.activations.reference import ACTIVATIONS
from graphopt.triton_kernels.choice import OF_CPU, Family
from graphopt.triton_kernels.registration import check_floating, check_row, check_same, define

FAMILY = Family("activations", widest=2**31 - 1, native=OF_CPU)


def _gated(gate: Tensor, up: Tensor, activation: str) -> Any:
    check_floating("gated", "gate", gate)
    check_same("gated", "up", up, gate)
    _check_activation("gated", activation)
    return FAMILY.run("gated", gate, up, activation)


def _gated_backward(gradient: Tensor, gate: Tensor, up: Tensor, activation: str) -> Any:
    check_floating("gated_backward", "gradient", gradient)
    check_same("gated_backward", "gate", gate, gradient)
    check_same("gated_backward", "up", up, gradient)
    _check_activation("gated_backward", activation)
    return FAMILY.run("gated_backward", gradient, gate, up, activation)


def _bias_activation(x: Tensor, bias: Tensor | None, activation: str) -> Any:
    check_floating("bias_activation", "x", x)
    check_row("bias_activation", "bias", bias, x)
    _check_activation("bias_activation", activation)
    return FAMILY.run("bias_activation", x, bias, activation)


def _bias_activation_backward(gradient: Tensor, x: Tensor, bias: Tensor | None, activation: str) -> Any:
    check_floating("bias_activation_backward", "gradient", gradient)
    check_same("bias_activation_backward", "x", x, gradient)
    check_row("bias_activation_backward", "bias", bias, x)
    _check_activation("bias_activation_backward", activation)
    return FAMILY.run("bias_activation_backward", gradient, x, bias, activation)


def _check_activation(operator: str, activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"{operator}: activation is {activation!r}: {nearest(activation, ACTIVATIONS)}")


def _like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _of_bias(bias: Tensor | None, x: Tensor) -> Tensor:
    if bias is None:
        return x.new_empty(0, dtype=torch.promote_types(x.dtype, torch.float32))
    return bias.new_empty(bias.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, activation = inputs
    ctx.save_for_backward(*tensors)
    ctx.activation = activation


def _of_gated(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return *GATED_BACKWARD(gradient, *ctx.saved_tensors, ctx.activation), None


def _of_biased(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, bias = ctx.saved_tensors
    of_x, of_bias = BIAS_ACTIVATION_BACKWARD(gradient, x, bias, ctx.activation)
    return of_x, None if bias is None else of_bias, None


GATED_BACKWARD = define(
    "gated_backward(Tensor gradient, Tensor gate, Tensor up, str activation) -> (Tensor, Tensor)",
    _gated_backward,
    lambda gradient, gate, up, activation: (_like(gate), _like(up)),
    family=FAMILY,
)
GATED = define(
    "gated(Tensor gate, Tensor up, str activation) -> Tensor",
    _gated,
    lambda gate, up, activation: _like(gate),
    save=_save,
    backward=_of_gated,
    family=FAMILY,
)
BIAS_ACTIVATION_BACKWARD = define(
    "bias_activation_backward(Tensor gradient, Tensor x, Tensor? bias, str activation) -> (Tensor, Tensor)",
    _bias_activation_backward,
    lambda gradient, x, bias, activation: (_like(x), _of_bias(bias, x)),
    family=FAMILY,
)
BIAS_ACTIVATION = define(
    "bias_activation(Tensor x, Tensor? bias, str activation) -> Tensor",
    _bias_activation,
    lambda x, bias, activation: _like(x),
    save=_save,
    backward=_of_biased,
    family=FAMILY,
)
