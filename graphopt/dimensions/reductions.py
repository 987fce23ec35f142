"""Operators that reduce dimensions to one element, or to a few; and losses, which reduce all."""

from collections.abc import Mapping

import torch

from graphopt.dimensions.elementwise import aligned, broadcast, elementwise
from graphopt.dimensions.notation import Call, Labels, Rule, Shape, positions
from graphopt.dimensions.signature import Dimensions, Signature

aten = torch.ops.aten
_MEAN, _SUM = 1, 2  # the values of `reduction`


def total(call: Call) -> Signature | None:
    """Parts give summands."""
    labels, operand, results, _ = _reduced(call)
    return labels.signature([operand], results, linear=[frozenset({0})])


def mean(call: Call) -> Signature | None:
    """As `total`, but parts divide by too small a number."""
    labels, operand, results, reduced = _reduced(call)
    return labels.signature([operand], results, localized=reduced, linear=[frozenset({0})])


def statistic(call: Call) -> Signature | None:
    """Parts do not add up."""
    if call.shape("other") is not None:  # of two tensors, element by element
        return elementwise(call)
    labels, operand, results, reduced = _reduced(call)
    labels.whole |= reduced
    return labels.signature([operand], results)


def _reduced(call: Call) -> tuple[Labels, Dimensions, list[Dimensions], set[str]]:
    """Labels of operand and results, and those that the operator reduces."""
    (shape,) = call.operands
    along = _along(call["dim"], len(shape))
    labels = Labels()
    operand = aligned(labels, shape, shape)
    kept = () if call["keepdim"] else None
    result = tuple(kept if at in along else named for at, named in enumerate(operand))
    reduced = {label for at in along for label in operand[at]} if operand else set()
    return labels, operand, [tuple(d for d in result if d is not None)] * len(call.results), reduced


def _along(dim: object, rank: int) -> set[int]:
    """The dimensions that an argument names; all if it names none."""
    dims = [dim] if isinstance(dim, int) else dim
    return {each % rank for each in dims} if isinstance(dims, (list, tuple)) and dims and rank else set(range(rank))


def chosen(call: Call) -> Signature | None:
    """Some or all elements along one dimension, in another order."""
    (shape,) = call.operands
    at = call["dim"] % len(shape) if shape else 0
    labels = Labels()

    def named(sizes: Shape) -> Dimensions:
        places = zip(positions(len(shape)), sizes, strict=True)
        return tuple(
            labels.apart(size) if index == at else labels.name(p, size) for index, (p, size) in enumerate(places)
        )

    operand = named(shape)
    result = named(call.results[0])
    return labels.signature([operand], [result] * len(call.results))


def loss(call: Call) -> Signature | None:
    """Element by element, and then nothing, the mean or the sum."""
    if call["reduction"] not in (_MEAN, _SUM):
        return broadcast(call)
    shape = max(call.operands, key=len)
    labels = Labels()
    operands = [aligned(labels, operand, shape) for operand in call.operands]
    every = positions(len(shape)) if call["reduction"] == _MEAN else ()
    return labels.signature(operands, [()], localized=every)


_STATISTICS = (
    aten.all, aten.amax, aten.amin, aten.any, aten.argmax, aten.argmin, aten.count_nonzero, aten.linalg_vector_norm,
    aten.logsumexp, aten.max, aten.median, aten.min, aten.norm, aten.prod, aten.std, aten.var, aten.var_mean,
    aten.std_mean, aten.nanmedian,
)  # fmt: skip
_LOSSES = (
    aten.binary_cross_entropy, aten.binary_cross_entropy_with_logits, aten.huber_loss, aten.kl_div, aten.l1_loss,
    aten.mse_loss, aten.smooth_l1_loss, aten.soft_margin_loss,
)  # fmt: skip

RULES: Mapping[object, Rule] = {
    **dict.fromkeys((aten.sum, aten.nansum), total),
    **dict.fromkeys(_STATISTICS, statistic),
    **dict.fromkeys((aten.argsort, aten.kthvalue, aten.mode, aten.sort, aten.topk), chosen),
    **dict.fromkeys(_LOSSES, loss),
    aten.mean: mean,
}
