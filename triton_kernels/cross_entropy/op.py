"""The operators of cross-entropy. What they compute is written in `reference` and, with a linear layer, in `linear`."""

from typing import Any

import torch
from torch import Tensor

from graphopt.triton_kernels.choice import OF_CPU, Family
from graphopt.triton_kernels.registration import check_floating, define, describe

FAMILY = Family("cross_entropy", widest=2**31 - 1, native=OF_CPU)
_OPTIONS = "int ignore_index, float label_smoothing, float z_loss"


def _cross_entropy(
    logits: Tensor, targets: Tensor, ignore_index: int, label_smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor]:
    _check("cross_entropy", logits, targets, ignore_index, label_smoothing)
    return FAMILY.run("cross_entropy", logits, targets, ignore_index, label_smoothing, z_loss)  # type: ignore[no-any-return]


def _cross_entropy_backward(
    logits: Tensor,
    gradient: Tensor,
    targets: Tensor,
    lse: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> Tensor:
    _check_backward("cross_entropy_backward", logits, gradient, targets, lse, ignore_index, label_smoothing)
    return FAMILY.run(  # type: ignore[no-any-return]
        "cross_entropy_backward", logits, gradient, targets, lse, ignore_index, label_smoothing, z_loss
    )


def _cross_entropy_backward_(
    logits: Tensor,
    gradient: Tensor,
    targets: Tensor,
    lse: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> None:
    _check_backward("cross_entropy_backward_", logits, gradient, targets, lse, ignore_index, label_smoothing)
    if not logits.is_contiguous():
        raise ValueError(f"cross_entropy_backward_: logits, {describe(logits)}, have gaps: make them contiguous")
    FAMILY.run("cross_entropy_backward_", logits, gradient, targets, lse, ignore_index, label_smoothing, z_loss)


def _check(operator: str, logits: Tensor, targets: Tensor, ignore_index: int, label_smoothing: float) -> None:
    check_floating(operator, "logits", logits)
    if logits.shape[-1] == 0:
        raise ValueError(f"{operator}: logits are {describe(logits)}, of no class")
    if targets.shape != logits.shape[:-1] or targets.dtype != torch.int64 or targets.device != logits.device:
        raise ValueError(
            f"{operator}: targets are {describe(targets)}, not int64 {list(logits.shape[:-1])} on {logits.device}"
        )
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{operator}: label_smoothing is {label_smoothing}, not from 0 to 1")
    if targets.is_cpu:  # elsewhere a look would wait for the device, and the loss is not a number
        wrong = targets[(targets != ignore_index) & ((targets < 0) | (targets >= logits.shape[-1]))]
        if len(wrong):
            raise ValueError(
                f"{operator}: targets have {int(wrong[0])}, which is neither a class, from 0 to {logits.shape[-1] - 1},"
                f" nor ignore_index, {ignore_index}"
            )


def _check_backward(
    operator: str, logits: Tensor, gradient: Tensor, targets: Tensor, lse: Tensor, ignore_index: int, smoothing: float
) -> None:
    _check(operator, logits, targets, ignore_index, smoothing)
    for name, value in (("gradient", gradient), ("lse", lse)):
        if value.shape != targets.shape or value.dtype != _of_losses(logits) or value.device != logits.device:
            wanted = f"{_of_losses(logits)} {list(targets.shape)} on {logits.device}"
            raise ValueError(f"{operator}: {name} is {describe(value)}, not {wanted}")


def _of_losses(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _per_token(logits: Tensor) -> Tensor:
    return logits.new_empty(logits.shape[:-1], dtype=_of_losses(logits))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, targets, *ctx.options = inputs
    _, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(logits, targets, lse)


def _backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    logits, targets, lse = ctx.saved_tensors
    return CROSS_ENTROPY_BACKWARD(logits, gradient, targets, lse, *ctx.options), None, None, None, None


CROSS_ENTROPY_BACKWARD = define(
    f"cross_entropy_backward(Tensor logits, Tensor gradient, Tensor targets, Tensor lse, {_OPTIONS}) -> Tensor",
    _cross_entropy_backward,
    lambda logits, *_: logits.new_empty(logits.shape),
)
CROSS_ENTROPY_BACKWARD_ = define(
    f"cross_entropy_backward_(Tensor(a!) logits, Tensor gradient, Tensor targets, Tensor lse, {_OPTIONS}) -> ()",
    _cross_entropy_backward_,
    lambda *_: None,
)
CROSS_ENTROPY = define(
    f"cross_entropy(Tensor logits, Tensor targets, {_OPTIONS}) -> (Tensor, Tensor)",
    _cross_entropy,
    lambda logits, *_: (_per_token(logits), _per_token(logits)),
    save=_save,
    backward=_backward,
)
