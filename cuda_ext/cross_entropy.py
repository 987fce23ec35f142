"""Cross-entropy of logits and integer targets, with label smoothing and z-loss: forward, backward, or both in one pass.

The loss of a token is (1 - s) (l - x[target]) + s (l - mean of x) + z l², where l is the logarithm of the sum of e^x:
s smooths labels (Szegedy et al., arXiv:1512.00567), z keeps l near 0 (Chowdhery et al., PaLM, arXiv:2204.02311).

Logits [tokens, vocabulary] are float32 or bfloat16, arithmetic is float32; targets are int64 [tokens]. A token whose
target is `ignore_index` has loss 0 and gradient 0. Functions raise ValueError that names the argument which does not
fit.
"""

import torch

from graphopt.cuda_ext import reference
from graphopt.cuda_ext.arguments import ELEMENTS, FLOAT32, check
from graphopt.cuda_ext.library import Library, library

_SOURCE = "cross_entropy.cpp"


def cross_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(losses, l), both float32 [tokens]; l is 0 where a token is ignored."""
    _check(logits, targets, ignore_index)
    native = library(_SOURCE)
    if native is None:
        return reference.cross_entropy(
            logits, targets, ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss
        )
    losses = logits.new_empty(logits.shape[0], dtype=torch.float32)
    log_normalizers = torch.empty_like(losses)
    tensors = (logits, targets, None, losses, log_normalizers, None)
    _call(native, tensors, ignore_index, label_smoothing, z_loss)
    return losses, log_normalizers


def cross_entropy_backward(
    dlosses: torch.Tensor,
    logits: torch.Tensor,
    targets: torch.Tensor,
    log_normalizers: torch.Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    in_place: bool = False,
) -> torch.Tensor:
    """The gradient of logits, in their dtype, where that of losses is float32 `dlosses` [tokens].

    in_place: it is written over the logits, and these are returned.
    """
    _check(logits, targets, ignore_index)
    for name, tensor in (("dlosses", dlosses), ("log_normalizers", log_normalizers)):
        check(name, tensor, logits.shape[:1], FLOAT32)
    native = library(_SOURCE)
    if native is None:
        gradient = reference.cross_entropy_backward(
            dlosses,
            logits,
            targets,
            log_normalizers,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
        )
        return logits.copy_(gradient) if in_place else gradient
    gradient = logits if in_place else torch.empty_like(logits)
    tensors = (logits, targets, dlosses, None, log_normalizers, gradient)
    _call(native, tensors, ignore_index, label_smoothing, z_loss)
    return gradient


def cross_entropy_with_gradient(
    logits: torch.Tensor,
    targets: torch.Tensor,
    scales: torch.Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    in_place: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(losses, l, the gradient of logits), where that of losses is float32 `scales` [tokens], or 1.

    Logits are read from memory once for all three. in_place: the gradient is written over them.
    """
    _check(logits, targets, ignore_index)
    if scales is not None:
        check("scales", scales, logits.shape[:1], FLOAT32)
    native = library(_SOURCE)
    if native is None:
        losses, log_normalizers, gradient = reference.cross_entropy_with_gradient(
            logits, targets, scales, ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss
        )
        return losses, log_normalizers, logits.copy_(gradient) if in_place else gradient
    losses = logits.new_empty(logits.shape[0], dtype=torch.float32)
    log_normalizers = torch.empty_like(losses)
    gradient = logits if in_place else torch.empty_like(logits)
    tensors = (logits, targets, scales, losses, log_normalizers, gradient)
    _call(native, tensors, ignore_index, label_smoothing, z_loss)
    return losses, log_normalizers, gradient


def cross_entropy_part(
    logits: torch.Tensor, targets: torch.Tensor, has_totals: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Of a part of the columns, for each token (largest, powers, chosen, totals or None), float32 [tokens].

    The largest logit m, the sum of e^(x - m), the logit of the target, and the sum of all. targets: counted from the
    first column of the part; -1 for one that is not in it, of which the logit is 0.
    """
    _check(logits, targets, -1)
    native = library(_SOURCE)
    if native is None:
        return reference.cross_entropy_part(logits, targets, has_totals)
    largest = logits.new_empty(logits.shape[0], dtype=torch.float32)
    powers, chosen, totals = torch.empty_like(largest), torch.empty_like(largest), None
    if has_totals:
        totals = torch.empty_like(largest)
    tensors = (logits, targets, largest, powers, chosen, totals)
    native.call("cross_entropy_part", *tensors, *logits.shape, logits.dtype == torch.bfloat16)
    return largest, powers, chosen, totals


def cross_entropy_part_backward(
    logits: torch.Tensor,
    targets: torch.Tensor,
    largest: torch.Tensor,
    of_powers: torch.Tensor,
    of_chosen: torch.Tensor,
    of_totals: torch.Tensor | None,
    *,
    in_place: bool = False,
) -> torch.Tensor:
    """The gradient of logits, in their dtype, from those of what `cross_entropy_part` gives, float32 [tokens].

    in_place: it is written over the logits, and these are returned.
    """
    _check(logits, targets, -1)
    for name, tensor in (("largest", largest), ("of_powers", of_powers), ("of_chosen", of_chosen)):
        check(name, tensor, logits.shape[:1], FLOAT32)
    if of_totals is not None:
        check("of_totals", of_totals, logits.shape[:1], FLOAT32)
    native = library(_SOURCE)
    if native is None:
        found = reference.cross_entropy_part_backward(logits, targets, largest, of_powers, of_chosen, of_totals)
        return logits.copy_(found) if in_place else found
    gradient = logits if in_place else torch.empty_like(logits)
    tensors = (logits, targets, largest, of_powers, of_chosen, of_totals, gradient)
    native.call("cross_entropy_part_backward", *tensors, *logits.shape, logits.dtype == torch.bfloat16)
    if in_place:
        torch.autograd.graph.increment_version(logits)  # autograd cannot see this change
    return gradient


def _call(
    native: Library,
    tensors: tuple[torch.Tensor | None, ...],
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> None:
    logits, gradient = tensors[0], tensors[-1]
    assert logits is not None
    options = (ignore_index, float(label_smoothing), float(z_loss), logits.dtype == torch.bfloat16)
    native.call("cross_entropy", *tensors, *logits.shape, *options)
    if gradient is logits:
        torch.autograd.graph.increment_version(logits)  # autograd cannot see this change


def _check(logits: torch.Tensor, targets: torch.Tensor, ignore_index: int) -> None:
    check("logits", logits, (None, None), ELEMENTS)
    check("targets", targets, logits.shape[:1], (torch.int64,))
    if not targets.numel():
        return
    columns = logits.shape[1]
    lowest, highest = targets.aminmax()
    if lowest < 0 or highest >= columns:
        is_bad = ((targets < 0) | (targets >= columns)) & (targets != ignore_index)
        if is_bad.any():
            row = int(is_bad.nonzero()[0])
            known = f"neither one of {columns} columns nor ignore_index {ignore_index}"
            raise ValueError(f"targets[{row}] is {int(targets[row])}, {known}")
