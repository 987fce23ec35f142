"""Cross-entropy by `graphopt.cuda_ext`; functions have the arguments and results of those in `reference`."""

from torch import Tensor

from graphopt.cuda_ext import cross_entropy as native


def cross_entropy(
    logits: Tensor, targets: Tensor, ignore_index: int, label_smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor]:
    losses, lse = native.cross_entropy(
        _rows(logits),
        targets.reshape(-1),
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
    )
    return losses.clone().view(targets.shape), lse.clone().view(targets.shape)


def cross_entropy_backward(
    logits: Tensor,
    gradient: Tensor,
    targets: Tensor,
    lse: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> Tensor:
    rows = _rows(logits)
    return _put(rows, gradient, targets, lse, ignore_index, label_smoothing, z_loss, False).view(logits.shape)


def cross_entropy_backward_(
    logits: Tensor,
    gradient: Tensor,
    targets: Tensor,
    lse: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> None:
    _put(logits.view(-1, logits.shape[-1]), gradient, targets, lse, ignore_index, label_smoothing, z_loss, True)


def _put(
    rows: Tensor,
    gradient: Tensor,
    targets: Tensor,
    lse: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    in_place: bool,
) -> Tensor:
    of_tokens = (gradient.reshape(-1).contiguous(), rows, targets.reshape(-1), lse.reshape(-1))
    return native.cross_entropy_backward(
        *of_tokens,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        in_place=in_place,
    )


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()
