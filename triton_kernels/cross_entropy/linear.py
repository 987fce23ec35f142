"""A linear layer and the weighted sum of its tokens' cross-entropies, of which only a chunk of logits is ever held.

    linear_cross_entropy    sum over tokens of scale * cross_entropy(hidden @ weight.T)

hidden: [tokens, width], weight: [classes, width], targets: int64 [tokens], scales: float32 [tokens], constants; for a
mean, one over the number of tokens that are not ignored. Gradients are computed with the loss, chunk by chunk, as in
Liger Kernel (Hsu et al. 2024, arXiv:2410.10989): three products in all, where to compute the logits again in backward
takes four. That of the weight is summed in float32 at least.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from graphopt.triton_kernels.cross_entropy.op import CROSS_ENTROPY, CROSS_ENTROPY_BACKWARD_, FAMILY, exact
from graphopt.triton_kernels.registration import check_floating, define, describe

_LEAST_CHUNK = 1024  # tokens: fewer leave a product of matrices short of work


def _linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    scales: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    of_hidden: bool,
    of_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum, and the gradients of hidden and weight; each empty that is not asked for."""
    _check(hidden, weight, targets, scales)
    total = torch.zeros((), dtype=exact(hidden), device=hidden.device)
    hidden_gradient = hidden.new_empty(hidden.shape if of_hidden else 0)
    weight_sum = torch.zeros(weight.shape if of_weight else 0, dtype=exact(hidden), device=hidden.device)
    options = (ignore_index, label_smoothing, z_loss)
    for own in chunks(hidden, weight):
        logits = hidden[own] @ weight.t()
        losses, lse = CROSS_ENTROPY(logits, targets[own], *options)
        total += (losses * scales[own]).sum()
        if of_hidden or of_weight:
            CROSS_ENTROPY_BACKWARD_(logits, scales[own], targets[own], lse, *options)
        if of_hidden:
            torch.mm(logits, weight, out=hidden_gradient[own])
        if of_weight:
            weight_sum += logits.t() @ hidden[own]
    return total, hidden_gradient, weight_sum.to(weight.dtype)


def chunks(hidden: Tensor, weight: Tensor) -> Iterator[slice]:
    """Tokens whose logits take about as much memory as all of hidden, but not too few."""
    chunk = max(_LEAST_CHUNK, hidden.numel() // max(1, len(weight)))
    return (slice(first, first + chunk) for first in range(0, len(hidden), chunk))


def check_linear(operator: str, hidden: Tensor, weight: Tensor) -> None:
    """Raises ValueError unless the argument `weight` is a matrix for the argument `hidden`."""
    check_floating(operator, "hidden", hidden)
    if hidden.dim() != 2:
        raise ValueError(f"{operator}: hidden is {describe(hidden)}, not [tokens, width]")
    alike = weight.dtype == hidden.dtype and weight.device == hidden.device
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1] or not alike:
        raise ValueError(f"{operator}: weight is {describe(weight)}, which does not fit hidden, {describe(hidden)}")


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, scales: Tensor) -> None:
    operator = "linear_cross_entropy"
    check_linear(operator, hidden, weight)
    for name, of_token, dtype in (("targets", targets, torch.int64), ("scales", scales, exact(hidden))):
        if of_token.shape != hidden.shape[:1] or of_token.dtype != dtype or of_token.device != hidden.device:
            raise ValueError(
                f"{operator}: {name} is {describe(of_token)}, not {dtype} [{len(hidden)}] on {hidden.device}"
            )


def _fake(hidden: Tensor, weight: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, of_hidden, of_weight = others
    return (
        hidden.new_empty((), dtype=exact(hidden)),
        hidden.new_empty(hidden.shape if of_hidden else 0),
        weight.new_empty(weight.shape if of_weight else 0),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, weight, _, scales, *_, of_hidden, of_weight = inputs
    for name, tensor, has_gradient in (("hidden", hidden, of_hidden), ("weight", weight, of_weight)):
        if tensor.requires_grad and not has_gradient:
            raise ValueError(f"linear_cross_entropy: {name} requires a gradient, and of_{name} is False: set it")
    if scales.requires_grad:
        raise ValueError("linear_cross_entropy: scales are constants, and require a gradient: detach them")
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])
    ctx.asked = (of_hidden, of_weight)


def _backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    found = zip(ctx.saved_tensors, ctx.asked, strict=True)
    return *(gradient * saved if asked else None for saved, asked in found), *[None] * 7


LINEAR_CROSS_ENTROPY = define(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor targets, Tensor scales, int ignore_index,"
    " float label_smoothing, float z_loss, bool of_hidden, bool of_weight) -> (Tensor, Tensor, Tensor)",
    _linear_cross_entropy,
    _fake,
    save=_save,
    backward=_backward,
    family=FAMILY,
)
