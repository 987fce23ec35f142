"""Activations by `graphopt.cuda_ext`; functions have the arguments and results of those in `reference`."""

import torch
from torch import Tensor

from graphopt.cuda_ext import activations
from graphopt.triton_kernels.launch import rows_of


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return activations.gated(rows_of(gate), rows_of(up), activation).view(gate.shape)


def gated_backward(gradient: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    of_gate, of_up = activations.gated_backward(rows_of(gradient).contiguous(), rows_of(gate), rows_of(up), activation)
    return of_gate.view(gate.shape), of_up.view(up.shape)


def bias_activation(x: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    return activations.bias_activation(rows_of(x).contiguous(), bias, activation).view(x.shape)


def bias_activation_backward(
    gradient: Tensor, x: Tensor, bias: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    of_x, of_bias = activations.bias_activation_backward(
        rows_of(gradient).contiguous(), rows_of(x).contiguous(), bias, activation
    )
    return of_x.view(x.shape), torch.empty(0) if of_bias is None else of_bias
