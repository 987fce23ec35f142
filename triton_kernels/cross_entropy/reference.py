"""Cross-entropy of each token in operators of torch, in float32 or, of float64, in float64.

logits: [..., classes], targets: int64 [...]. With lse the logarithm of the sum of exponentials of a token's logits, s
the label smoothing (Szegedy et al. 2015, arXiv:1512.00567) and z the weight of the z-loss (Chowdhery et al. 2022,
arXiv:2204.02311):

    loss = (1 - s) * (lse - logit of the target) + s * (lse - mean of the logits) + z * lse^2

Both a loss and lse are zero where the target is `ignore_index`, and at least of float32.
"""

import torch
from torch import Tensor


def cross_entropy(
    logits: Tensor, targets: Tensor, ignore_index: int, label_smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor]:
    """loss and lse of each token."""
    wide = logits.contiguous().to(torch.promote_types(logits.dtype, torch.float32))
    lse = wide.logsumexp(-1)
    ignored = targets == ignore_index
    chosen = wide.gather(-1, targets.masked_fill(ignored, 0).unsqueeze(-1)).squeeze(-1)
    loss = (1 - label_smoothing) * (lse - chosen) + z_loss * lse.square()
    if label_smoothing:
        loss = loss + label_smoothing * (lse - wide.mean(-1))
    return loss.masked_fill(ignored, 0), lse.masked_fill(ignored, 0)


def cross_entropy_backward(
    logits: Tensor,
    gradient: Tensor,
    targets: Tensor,
    lse: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> Tensor:
    """The gradient of logits. gradient: of each loss."""
    wide = logits.contiguous().to(lse.dtype)
    ignored = targets == ignore_index
    of_logits = (wide - lse.unsqueeze(-1)).exp() * (1 + 2 * z_loss * lse).unsqueeze(-1)
    at = targets.masked_fill(ignored, 0).unsqueeze(-1)
    of_logits.scatter_add_(-1, at, torch.full_like(at, label_smoothing - 1, dtype=wide.dtype))
    of_logits -= label_smoothing / logits.shape[-1]
    of_logits *= gradient.unsqueeze(-1)
    return of_logits.masked_fill_(ignored.unsqueeze(-1), 0).to(logits.dtype)


def cross_entropy_backward_(
    logits: Tensor,
    gradient: Tensor,
    targets: Tensor,
    lse: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> None:
    """Puts the gradient of logits in their place."""
    logits.copy_(cross_entropy_backward(logits, gradient, targets, lse, ignore_index, label_smoothing, z_loss))
