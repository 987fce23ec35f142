"""Calls that do not come out right on parts of their operands by themselves, and what computes them by parts."""

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx

from graphopt._torch import argument
from graphopt.dimensions.forms import BALANCED, Order, Part
from graphopt.dimensions.signature import Signature, operands_of
from graphopt.dimensions.strategies import Cut
from graphopt.ir.context import FOLD
from graphopt.ir.moves import FIRST, LEAVE, MAXIMUM, OWN_PART
from graphopt.passes.split_attention import attention, can_attend
from graphopt.passes.split_local import Local, Results, operator_of

aten = torch.ops.aten


def can_be_localized(node: fx.Node, signature: Signature, cut: Cut) -> bool:
    """Whether a call can be computed by parts along a label along which its operator cannot run."""
    rule = _RULES.get(node.target)  # type: ignore[arg-type]
    return rule is not None and cut.order in rule.orders and rule.holds(node, signature, cut)


def localize(local: Local) -> Results:
    """The results of a call, computed from the parts that the rank has; in the forms that the strategy says."""
    return _RULES[local.node.target].compute(local)  # type: ignore[index]


@dataclass(frozen=True)
class _Rule:
    """holds: whether it can be used. compute: puts in calls that give the results. orders: of the rows of parts."""

    compute: Callable[[Local], Results]
    holds: Callable[[fx.Node, Signature, Cut], bool] = lambda node, signature, cut: True
    orders: tuple[Order | None, ...] = (None, BALANCED)


def _embedding(local: Local) -> Results:
    """A lookup in the rank's rows of a table: zeros for what is in others', so that the sum over ranks is the whole.

    To the row for padding no gradient comes.
    """
    weight, indices = local.operands
    row, inside = local.in_part(indices)
    found = local.call(aten.embedding.default, weight, row)
    if (padding := local.given("padding_idx")) >= 0:
        is_padding = local.call(aten.unsqueeze.default, local.call(aten.eq.Scalar, indices, padding), -1)
        found = local.call(aten.where.self, is_padding, local.call(aten.detach.default, found), found)
    outside = local.call(aten.logical_not.default, local.call(aten.unsqueeze.default, inside, -1))
    return [local.call(aten.masked_fill.Scalar, found, outside, 0)]


def _mean(local: Local) -> Results:
    """The sum of the rank's part, over the number of elements in all parts."""
    (value,) = local.operands
    dims = local.given("dim") or list(range(value.meta["val"].dim()))
    total = local.call(aten.sum.dim_IntList, value, dims, bool(local.given("keepdim")), dtype=local.given("dtype"))
    shape = local.whole_shape(0)
    return [local.call(aten.div.Tensor, total, math.prod(shape[dim] for dim in dims))]


def _dropout(local: Local) -> Results:
    """What is drawn is drawn for the whole, as on one device, and each rank takes its part."""
    (value,) = local.operands
    (part,) = (form for form in local.strategy.operands if isinstance(form, Part))
    tensor = value.meta["val"]
    ones = local.call(aten.ones.default, local.whole_shape(0), dtype=tensor.dtype, device=tensor.device)
    drawn = local.call(aten.native_dropout.default, ones, local.given("p"), local.given("train"))
    where = (part.dim, part.blocks, part.chunk, local.ranks, local.axis)
    items = [local.call(operator.getitem, drawn, index) for index in (0, 1)]
    if part.order is BALANCED:
        items = [local.call(FOLD, item, part.dim, part.blocks, local.ranks) for item in items]
    scale, mask = (local.call(OWN_PART, item, *where) for item in items)
    return [local.call(aten.mul.Tensor, value, scale), mask]


def _cross_entropy(local: Local) -> Results:
    """Of the rank's part of the classes, or of the tokens."""
    is_of_classes = local.cut.label in local.signature.operands[0][_class_dim(local.operands[0])]
    return [_over_classes(local) if is_of_classes else _over_tokens(local)]


def _over_tokens(local: Local) -> fx.Node:
    """The sum over the rank's tokens, over the number of tokens of all ranks that count."""
    logits, target = local.operands
    smoothing, ignored = local.given("label_smoothing") or 0.0, local.given("ignore_index")
    total = local.call(aten.cross_entropy_loss.default, logits, target, None, _SUM, ignored, smoothing)
    counted = local.call(aten.sum.default, local.call(aten.ne.Scalar, target, ignored))
    return local.call(aten.div.Tensor, total, local.call(LEAVE, counted, local.axis))


def _over_classes(local: Local) -> fx.Node:
    """Of logits of which each rank has some classes: three numbers a token are summed, and no logit moves.

    The log of the sum of exponentials, less the logit of the target (Shoeybi et al. 2019, section 3); with smoothing,
    less that share of the mean of all logits (Szegedy et al. 2016).
    """
    logits, target = local.operands
    call, dim = local.call, _class_dim(logits)
    classes = local.signature.sizes[local.cut.label]
    smoothing = local.given("label_smoothing") or 0.0
    if (dtype := logits.meta["val"].dtype).itemsize < 4:
        logits = call(aten._to_copy.default, logits, dtype=torch.float32)
    real = logits if local.cut.chunk * local.ranks == classes else _without_filling(local, logits, dim, classes)
    highest = call(MAXIMUM, call(aten.amax.default, call(aten.detach.default, real), [dim], True), local.axis)
    shifted = call(aten.sub.Tensor, real, highest)
    row, inside = local.in_part(target)
    row = call(aten.masked_fill.Scalar, row, call(aten.logical_not.default, inside), _ELSEWHERE)
    less_logit = call(aten.nll_loss_nd.default, shifted, row, None, _NONE, _ELSEWHERE)
    sums = [call(aten.sum.dim_IntList, call(aten.exp.default, shifted), [dim]), less_logit]
    if smoothing:
        less = call(aten.sub.Tensor, logits, highest)
        sums.append(call(aten.sum.dim_IntList, less, [dim]))
    totals = call(LEAVE, call(aten.stack.default, sums), local.axis)
    exponentials, less_logit, *rest = (call(aten.select.int, totals, 0, index) for index in range(len(sums)))
    logarithm = call(aten.log.default, exponentials)
    loss = call(aten.add.Tensor, logarithm, less_logit)
    if smoothing:
        spread = call(aten.sub.Tensor, logarithm, call(aten.div.Tensor, rest[0], classes))
        loss = call(
            aten.add.Tensor, call(aten.mul.Tensor, loss, 1 - smoothing), call(aten.mul.Tensor, spread, smoothing)
        )
    reduced = _reduced_loss(local, loss, target)
    if reduced.meta["val"].dtype != dtype:
        reduced = call(aten._to_copy.default, reduced, dtype=dtype)
    return call(FIRST, reduced, local.axis)


def _without_filling(local: Local, logits: fx.Node, dim: int, classes: int) -> fx.Node:
    """No class where a part is filled up."""
    device = logits.meta["val"].device
    shape = [1] * logits.meta["val"].dim()
    shape[dim] = -1
    ones = local.call(aten.ones.default, [classes], dtype=torch.bool, device=device)
    is_class = local.call(OWN_PART, ones, 0, 1, local.cut.chunk, local.ranks, local.axis)
    filling = local.call(aten.logical_not.default, local.call(aten.view.default, is_class, shape))
    return local.call(aten.masked_fill.Scalar, logits, filling, -math.inf)


def _reduced_loss(local: Local, loss: fx.Node, target: fx.Node) -> fx.Node:
    """The losses of tokens that count, as they are, summed or their mean."""
    call = local.call
    reduction = local.given("reduction")
    ignored = call(aten.eq.Scalar, target, local.given("ignore_index"))
    loss = call(aten.masked_fill.Scalar, loss, ignored, 0)
    if reduction == _NONE:
        return loss
    total = call(aten.sum.default, loss)
    if reduction == _SUM:
        return total
    counted = call(aten.sum.default, call(aten.logical_not.default, ignored))
    return call(aten.div.Tensor, total, counted)


def _class_dim(logits: fx.Node) -> int:
    return 1 if logits.meta["val"].dim() > 1 else 0


def _is_plain_cross_entropy(node: fx.Node, signature: Signature, cut: Cut) -> bool:
    """Of targets that are numbers of classes, these without weights; over classes, or the mean over tokens."""
    operands = operands_of(node)
    if len(operands) != 2 or operands[1].meta["val"].is_floating_point():
        return False
    if cut.label not in signature.operands[0][_class_dim(operands[0])]:
        is_mean = argument(operator_of(node), "reduction", node.args, node.kwargs) == _MEAN
        return is_mean and signature.sizes[cut.label] // cut.blocks % cut.chunk == 0
    is_smoothed = bool(argument(operator_of(node), "label_smoothing", node.args, node.kwargs))
    if is_smoothed and signature.sizes[cut.label] % cut.chunk:  # what fills up the last part would count in the mean
        return False
    return cut.blocks == 1 and cut.order is None and cut.label in signature.operands[0][_class_dim(operands[0])]


_NONE, _MEAN, _SUM = 0, 1, 2  # of at::Reduction
_ELSEWHERE = -1  # in place of a class of which another rank has the logit
_RULES: dict[object, _Rule] = {
    aten.embedding.default: _Rule(_embedding, lambda node, signature, cut: cut.blocks == 1, (None,)),
    aten.mean.dim: _Rule(_mean),
    aten.mean.default: _Rule(_mean),
    aten.native_dropout.default: _Rule(_dropout),
    aten.scaled_dot_product_attention.default: _Rule(attention, can_attend),
    aten.cross_entropy_loss.default: _Rule(_cross_entropy, _is_plain_cross_entropy),
}
