"""Cross-entropy by `graphopt.cuda_ext`; functions have the arguments and results of those in `reference`."""

from torch import Tensor

from graphopt.cuda_ext import cross_entropy as native
from graphopt.triton_kernels.cross_entropy.reference import Options


def cross_entropy(logits: Tensor, targets: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    losses, lse = native.cross_entropy(_rows(logits), targets.reshape(-1), **options._asdict())
    return losses.view(targets.shape), lse.view(targets.shape)


def cross_entropy_backward(logits: Tensor, gradient: Tensor, targets: Tensor, lse: Tensor, options: Options) -> Tensor:
    of_tokens = (_flat(gradient), _rows(logits), targets.reshape(-1), _flat(lse))
    return native.cross_entropy_backward(*of_tokens, **options._asdict()).view(logits.shape)


def cross_entropy_backward_(logits: Tensor, gradient: Tensor, targets: Tensor, lse: Tensor, options: Options) -> None:
    of_tokens = (_flat(gradient), logits.view(-1, logits.shape[-1]), targets.reshape(-1), _flat(lse))
    native.cross_entropy_backward(*of_tokens, **options._asdict(), in_place=True)


def cross_entropy_part(logits: Tensor, targets: Tensor, has_totals: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *found, totals = native.cross_entropy_part(_rows(logits), targets.reshape(-1), has_totals)
    largest, powers, chosen = (each.view(targets.shape) for each in found)
    return largest, powers, chosen, largest.new_empty(0) if totals is None else totals.view(targets.shape)


def cross_entropy_part_backward(
    logits: Tensor, targets: Tensor, largest: Tensor, of_powers: Tensor, of_chosen: Tensor, of_totals: Tensor | None
) -> Tensor:
    of_tokens = _of_tokens(targets, largest, of_powers, of_chosen, of_totals)
    return native.cross_entropy_part_backward(_rows(logits), *of_tokens).view(logits.shape)


def cross_entropy_part_backward_(
    logits: Tensor, targets: Tensor, largest: Tensor, of_powers: Tensor, of_chosen: Tensor, of_totals: Tensor | None
) -> None:
    of_tokens = _of_tokens(targets, largest, of_powers, of_chosen, of_totals)
    native.cross_entropy_part_backward(logits.view(-1, logits.shape[-1]), *of_tokens, in_place=True)


def _of_tokens(
    targets: Tensor, largest: Tensor, of_powers: Tensor, of_chosen: Tensor, of_totals: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    totals = None if of_totals is None else _flat(of_totals)
    return _flat(targets), _flat(largest), _flat(of_powers), _flat(of_chosen), totals


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1).contiguous()


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()
