"""The operators of cross-entropy. What they compute is written in `reference` and, with a linear layer, in `linear`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from graphopt.triton_kernels.choice import OF_CPU, Family
from graphopt.triton_kernels.cross_entropy.reference import Options
from graphopt.triton_kernels.registration import check_floating, define, describe

FAMILY = Family("cross_entropy", widest=2**31 - 1, native=OF_CPU)
_OPTIONS = "int ignore_index, float label_smoothing, float z_loss"


def _cross_entropy(logits: Tensor, targets: Tensor, *given: Any) -> Any:
    options = _checked("cross_entropy", logits, targets, given)
    return FAMILY.run("cross_entropy", logits, targets, options)


def _cross_entropy_backward(logits: Tensor, gradient: Tensor, targets: Tensor, lse: Tensor, *given: Any) -> Any:
    options = _checked("cross_entropy_backward", logits, targets, given, gradient=gradient, lse=lse)
    return FAMILY.run("cross_entropy_backward", logits, gradient, targets, lse, options)


def _cross_entropy_backward_(logits: Tensor, gradient: Tensor, targets: Tensor, lse: Tensor, *given: Any) -> None:
    options = _checked("cross_entropy_backward_", logits, targets, given, gradient=gradient, lse=lse)
    if not logits.is_contiguous():
        raise ValueError(f"cross_entropy_backward_: logits, {describe(logits)}, have gaps: make them contiguous")
    FAMILY.run("cross_entropy_backward_", logits, gradient, targets, lse, options)


def _checked(operator: str, logits: Tensor, targets: Tensor, given: Sequence[Any], **of_tokens: Tensor) -> Options:
    options = Options(*given)
    check_logits(operator, logits, targets, options.ignore_index, "ignore_index")
    if not 0 <= options.label_smoothing <= 1:
        raise ValueError(f"{operator}: label_smoothing is {options.label_smoothing}, not from 0 to 1")
    check_of_tokens(operator, logits, targets, **of_tokens)
    return options


def check_logits(operator: str, logits: Tensor, targets: Tensor, other: int, name: str) -> None:
    """Raises ValueError unless targets are classes of the logits, or the `other` number, which is called `name`."""
    check_floating(operator, "logits", logits)
    if logits.shape[-1] == 0:
        raise ValueError(f"{operator}: logits are {describe(logits)}, of no class")
    check_targets(operator, targets, logits.shape[:-1], logits.shape[-1], logits.device, other, name)


def check_targets(
    operator: str, targets: Tensor, shape: Sequence[int], classes: int, device: torch.device, other: int, name: str
) -> None:
    """Raises ValueError unless targets are int64 of this shape, each a class or the `other` number."""
    if targets.shape != torch.Size(shape) or targets.dtype != torch.int64 or targets.device != device:
        raise ValueError(f"{operator}: targets are {describe(targets)}, not int64 {list(shape)} on {device}")
    if targets.is_cpu:  # elsewhere a look would wait for the device, and the loss is not a number
        wrong = targets[(targets != other) & ((targets < 0) | (targets >= classes))]
        if len(wrong):
            raise ValueError(
                f"{operator}: targets have {int(wrong[0])}, which is neither a class, from 0 to {classes - 1},"
                f" nor {name}, {other}"
            )


def check_of_tokens(operator: str, like: Tensor, targets: Tensor, **of_tokens: Tensor | None) -> None:
    """Raises ValueError unless each tensor that is given has an exact number for each target."""
    dtype = exact(like)
    for name, value in of_tokens.items():
        if value is not None and (
            value.shape != targets.shape or value.dtype != dtype or value.device != targets.device
        ):
            wanted = f"{dtype} {list(targets.shape)} on {targets.device}"
            raise ValueError(f"{operator}: {name} is {describe(value)}, not {wanted}")


def exact(x: Tensor) -> torch.dtype:
    """The dtype of losses and sums."""
    return torch.promote_types(x.dtype, torch.float32)


def _per_token(logits: Tensor) -> Tensor:
    return logits.new_empty(logits.shape[:-1], dtype=exact(logits))


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
    family=FAMILY,
)
CROSS_ENTROPY_BACKWARD_ = define(
    f"cross_entropy_backward_(Tensor(a!) logits, Tensor gradient, Tensor targets, Tensor lse, {_OPTIONS}) -> ()",
    _cross_entropy_backward_,
    lambda *_: None,
    family=FAMILY,
)
CROSS_ENTROPY = define(
    f"cross_entropy(Tensor logits, Tensor targets, {_OPTIONS}) -> (Tensor, Tensor)",
    _cross_entropy,
    lambda logits, *_: (_per_token(logits), _per_token(logits)),
    save=_save,
    backward=_backward,
    family=FAMILY,
)
