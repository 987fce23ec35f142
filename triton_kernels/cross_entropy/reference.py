"""Cross-entropy of each token in operators of torch, in float32 or, of float64, in float64.

logits: [..., classes], targets: int64 [...]. With lse the logarithm of the sum of exponentials of a token's logits, s
the label smoothing (Szegedy et al. 2015, arXiv:1512.00567) and z the weight of the z-loss (Chowdhery et al. 2022,
arXiv:2204.02311):

    loss = (1 - s) * (lse - logit of the target) + s * (lse - mean of the logits) + z * lse^2

Both a loss and lse are zero where the target is `ignore_index`, and at least of float32.

Of logits of which other ranks have the other classes, a part is what these numbers follow from: the largest logit, the
sum of the exponentials of what logits are above it, the logit of the target, and the sum of all (Shoeybi et al. 2019,
arXiv:1909.08053, section 3). There a target is counted from the first class of the part, -1 if it is not in it.
"""

from typing import NamedTuple

from torch import Tensor

from graphopt.cuda_ext import reference


class Options(NamedTuple):
    """Of a loss, in the order in which operators take them."""

    ignore_index: int
    label_smoothing: float
    z_loss: float


def cross_entropy(logits: Tensor, targets: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """loss and lse of each token."""
    return reference.cross_entropy(logits, targets, **options._asdict())


def cross_entropy_backward(logits: Tensor, gradient: Tensor, targets: Tensor, lse: Tensor, options: Options) -> Tensor:
    """The gradient of logits. gradient: of each loss."""
    return reference.cross_entropy_backward(gradient, logits, targets, lse, **options._asdict())


def cross_entropy_backward_(logits: Tensor, gradient: Tensor, targets: Tensor, lse: Tensor, options: Options) -> None:
    """Puts the gradient of logits in their place."""
    logits.copy_(cross_entropy_backward(logits, gradient, targets, lse, options))


def cross_entropy_part(logits: Tensor, targets: Tensor, has_totals: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """largest, powers, chosen and totals, the last empty if they are not asked for."""
    largest, powers, chosen, totals = reference.cross_entropy_part(logits, targets, has_totals)
    return largest, powers, chosen, largest.new_empty(0) if totals is None else totals


def cross_entropy_part_backward(
    logits: Tensor, targets: Tensor, largest: Tensor, of_powers: Tensor, of_chosen: Tensor, of_totals: Tensor | None
) -> Tensor:
    """The gradient of logits, from those of what a part gives; the largest has none."""
    return reference.cross_entropy_part_backward(logits, targets, largest, of_powers, of_chosen, of_totals)


def cross_entropy_part_backward_(
    logits: Tensor, targets: Tensor, largest: Tensor, of_powers: Tensor, of_chosen: Tensor, of_totals: Tensor | None
) -> None:
    """Puts the gradient of logits in their place."""
    logits.copy_(cross_entropy_part_backward(logits, targets, largest, of_powers, of_chosen, of_totals))
