"""Cross-entropy of logits of which other ranks have the other classes: what follows from a part of them.

    cross_entropy_part           (largest, powers, chosen, totals) of each token: `reference` says what they are
    linear_cross_entropy_part    the same of hidden @ weight.T, of which only a chunk is ever held

With M the largest logit of all ranks, the sum of exponentials above it is that of powers * exp(largest - M) over the
ranks. The largest logit has no gradient, for it cancels in the loss; the gradients of the others are known when the
ranks have met, so backward of the second computes the logits again, chunk by chunk, and puts their gradient in their
place: four products in all. Targets are counted from the part's first class, -1 for those of other ranks.
"""

from typing import Any

import torch
from torch import Tensor

from graphopt.triton_kernels.cross_entropy.linear import check_linear, chunks
from graphopt.triton_kernels.cross_entropy.op import FAMILY, check_logits, check_of_tokens, check_targets, exact
from graphopt.triton_kernels.registration import define

ELSEWHERE = -1  # in place of a class of which another rank has the logit
_OF_PARTS = "Tensor largest, Tensor of_powers, Tensor of_chosen, Tensor? of_totals"
_PARTS = "(Tensor, Tensor, Tensor, Tensor)"


def _part(logits: Tensor, targets: Tensor, has_totals: bool) -> Any:
    check_logits("cross_entropy_part", logits, targets, ELSEWHERE, "what is elsewhere")
    return FAMILY.run("cross_entropy_part", logits, targets, has_totals)


def _part_backward(
    logits: Tensor, targets: Tensor, largest: Tensor, of_powers: Tensor, of_chosen: Tensor, of_totals: Tensor | None
) -> Any:
    operator = "cross_entropy_part_backward"
    check_logits(operator, logits, targets, ELSEWHERE, "what is elsewhere")
    of_tokens = {"largest": largest, "of_powers": of_powers, "of_chosen": of_chosen, "of_totals": of_totals}
    check_of_tokens(operator, logits, targets, **of_tokens)
    return FAMILY.run(operator, logits, targets, largest, of_powers, of_chosen, of_totals)


def _linear(hidden: Tensor, weight: Tensor, targets: Tensor, has_totals: bool) -> tuple[Tensor, ...]:
    _check("linear_cross_entropy_part", hidden, weight, targets)
    found = _fakes(hidden, has_totals)
    for own in chunks(hidden, weight):
        logits = hidden[own] @ weight.t()
        parts = FAMILY.run("cross_entropy_part", logits, targets[own], has_totals)
        for whole, part in zip(found, parts, strict=True):
            if whole.numel():
                whole[own] = part
    return found


def _linear_backward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    largest: Tensor,
    of_powers: Tensor,
    of_chosen: Tensor,
    of_totals: Tensor | None,
    of_hidden: bool,
    of_weight: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients of hidden and weight, each empty that is not asked for; the latter summed in float32 at least."""
    operator = "linear_cross_entropy_part_backward"
    _check(operator, hidden, weight, targets)
    of_tokens = {"largest": largest, "of_powers": of_powers, "of_chosen": of_chosen, "of_totals": of_totals}
    check_of_tokens(operator, hidden, targets, **of_tokens)
    hidden_gradient = hidden.new_empty(hidden.shape if of_hidden else 0)
    weight_sum = torch.zeros(weight.shape if of_weight else 0, dtype=exact(hidden), device=hidden.device)
    for own in chunks(hidden, weight):
        logits = hidden[own] @ weight.t()
        given = (each if each is None else each[own] for each in of_tokens.values())
        FAMILY.run("cross_entropy_part_backward_", logits, targets[own], *given)
        if of_hidden:
            torch.mm(logits, weight, out=hidden_gradient[own])
        if of_weight:
            weight_sum += logits.t() @ hidden[own]
    return hidden_gradient, weight_sum.to(weight.dtype)


def _check(operator: str, hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    check_linear(operator, hidden, weight)
    if len(weight) == 0:
        raise ValueError(f"{operator}: weight is of no class")
    check_targets(operator, targets, hidden.shape[:1], len(weight), hidden.device, ELSEWHERE, "what is elsewhere")


def _fakes(x: Tensor, has_totals: bool) -> tuple[Tensor, ...]:
    """A number for each token of x, four times."""
    shapes = [x.shape[:-1]] * 3 + [x.shape[:-1] if has_totals else (0,)]
    return tuple(x.new_empty(shape, dtype=exact(x)) for shape in shapes)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.has_totals = inputs
    largest, *_, totals = output
    ctx.mark_non_differentiable(largest, *([] if ctx.has_totals else [totals]))
    ctx.save_for_backward(*tensors, largest)


def _backward(ctx: Any, _: Tensor, of_powers: Tensor, of_chosen: Tensor, of_totals: Tensor) -> tuple[Any, ...]:
    given = (of_powers, of_chosen, of_totals if ctx.has_totals else None)
    return CROSS_ENTROPY_PART_BACKWARD(*ctx.saved_tensors, *given), None, None


def _backward_of_linear(
    ctx: Any, _: Tensor, of_powers: Tensor, of_chosen: Tensor, of_totals: Tensor
) -> tuple[Any, ...]:
    asked = tuple(ctx.needs_input_grad[:2])
    given = (of_powers, of_chosen, of_totals if ctx.has_totals else None)
    found = LINEAR_CROSS_ENTROPY_PART_BACKWARD(*ctx.saved_tensors, *given, *asked)
    return *(each if wanted else None for each, wanted in zip(found, asked, strict=True)), None, None


CROSS_ENTROPY_PART_BACKWARD = define(
    f"cross_entropy_part_backward(Tensor logits, Tensor targets, {_OF_PARTS}) -> Tensor",
    _part_backward,
    lambda logits, *_: logits.new_empty(logits.shape),
    family=FAMILY,
)
CROSS_ENTROPY_PART = define(
    f"cross_entropy_part(Tensor logits, Tensor targets, bool has_totals) -> {_PARTS}",
    _part,
    lambda logits, targets, has_totals: _fakes(logits, has_totals),
    save=_save,
    backward=_backward,
    family=FAMILY,
)
LINEAR_CROSS_ENTROPY_PART_BACKWARD = define(
    f"linear_cross_entropy_part_backward(Tensor hidden, Tensor weight, Tensor targets, {_OF_PARTS}, bool of_hidden,"
    " bool of_weight) -> (Tensor, Tensor)",
    _linear_backward,
    lambda hidden, weight, *others: (
        hidden.new_empty(hidden.shape if others[-2] else 0),
        weight.new_empty(weight.shape if others[-1] else 0),
    ),
    family=FAMILY,
)
LINEAR_CROSS_ENTROPY_PART = define(
    f"linear_cross_entropy_part(Tensor hidden, Tensor weight, Tensor targets, bool has_totals) -> {_PARTS}",
    _linear,
    lambda hidden, weight, targets, has_totals: _fakes(hidden, has_totals),
    save=_save,
    backward=_backward_of_linear,
    family=FAMILY,
)
