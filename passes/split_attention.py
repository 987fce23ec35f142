"""Attention on parts of what it is given, where its operator alone would not come out right."""

import math

import torch
from torch import fx

from graphopt._torch import argument
from graphopt.dimensions.forms import BALANCED, Part
from graphopt.dimensions.signature import Signature, operands_of
from graphopt.dimensions.strategies import Cut
from graphopt.ir.context import CONTEXT_ATTENTION
from graphopt.ir.moves import OWN_PART
from graphopt.passes.split_local import Local, Results, operator_of
from graphopt.passes.split_order import why_unbalanced

aten = torch.ops.aten


def attention(local: Local) -> Results:
    """Balanced, under a mask made for where the rank's queries stand, or with its part of the scores dropped."""
    if local.given("dropout_p"):
        return [_dropped(local)]
    query, key, value = local.operands
    if local.cut.order is BALANCED:
        return [_balanced(local, query, key, value)]
    more = {name: local.given(name) for name in ("scale", "enable_gqa")}
    attend = aten.scaled_dot_product_attention.default
    return [local.call(attend, query, key, value, _causal_mask(local, local.first_row()), 0.0, False, **more)]


def can_attend(node: fx.Node, signature: Signature, cut: Cut) -> bool:
    """Along the queries under a causal mask; where scores are dropped, along any dimension of queries or values."""
    operator = operator_of(node)
    given = {name: argument(operator, name, node.args, node.kwargs) for name in ("is_causal", "dropout_p", "attn_mask")}
    if given["dropout_p"]:
        is_along_causal = given["is_causal"] and cut.label in signature.operands[0][-2]
        is_one_block = cut.blocks == 1 or not is_along_causal
        return cut.order is None and is_one_block and _is_of_scores_or_values(node, signature, cut)
    is_causal_alone = given["is_causal"] is True and given["attn_mask"] is None and cut.blocks == 1
    return is_causal_alone and (cut.order is None or why_unbalanced(node) is None)


def _is_of_scores_or_values(node: fx.Node, signature: Signature, cut: Cut) -> bool:
    query, key, value = operands_of(node)[:3]
    ranks = {each.meta["val"].dim() for each in (query, key, value)}
    of_query, of_value = (any(cut.label in dim for dim in signature.operands[index]) for index in (0, 2))
    return ranks == {4} and (of_query or of_value)


def _balanced(local: Local, query: fx.Node, key: fx.Node, value: fx.Node) -> fx.Node:
    """Values narrower than keys are filled up with zeros, as fused kernels want them of one width."""
    width, narrow = (node.meta["val"].shape[-1] for node in (query, value))
    if narrow < width:
        value = local.call(aten.constant_pad_nd.default, value, [0, width - narrow])
    attended = local.call(CONTEXT_ATTENTION, query, key, value, local.given("scale"), local.ranks, local.axis)
    return attended if narrow == width else local.call(aten.slice.Tensor, attended, -1, 0, narrow)


def _causal_mask(local: Local, first_row: fx.Node | int) -> fx.Node:
    """Which keys each of the rank's queries sees, if its first is that of this number."""
    query, key = local.operands[:2]
    device = query.meta["val"].device
    row = local.call(aten.arange.default, query.meta["val"].shape[-2], device=device)
    row = local.call(aten.add.Tensor, row, first_row)
    column = local.call(aten.arange.default, key.meta["val"].shape[-2], device=device)
    return local.call(aten.ge.Tensor, local.call(aten.unsqueeze.default, row, 1), column)


def _dropped(local: Local) -> fx.Node:
    """Step by step. What is drawn is drawn for the whole, as on one device, and the rank takes its part."""
    query, key, value, *masks = local.operands
    call = local.call
    heads, heads_of_keys = (each.meta["val"].shape[1] for each in (query, key))
    if heads != heads_of_keys:
        key, value = (call(aten.repeat_interleave.self_int, each, heads // heads_of_keys, 1) for each in (key, value))
    scale = local.given("scale") or 1 / math.sqrt(query.meta["val"].shape[-1])
    scores = call(aten.matmul.default, call(aten.mul.Tensor, query, scale), call(aten.transpose.int, key, -2, -1))
    form = local.strategy.operands[0]
    part = form if isinstance(form, Part) else None
    if local.given("is_causal"):
        is_along_queries = part is not None and part.dim == 2
        masks = [_causal_mask(local, local.first_row() if is_along_queries else 0)]
    for mask in masks:
        if mask.meta["val"].dtype == torch.bool:
            scores = call(aten.masked_fill.Scalar, scores, call(aten.logical_not.default, mask), -math.inf)
        else:
            scores = call(aten.add.Tensor, scores, mask)
    shares = call(aten._safe_softmax.default, scores, -1)
    return call(aten.matmul.default, call(aten.mul.Tensor, shares, _kept(local, part)), value)


def _kept(local: Local, part: Part | None) -> fx.Node:
    """What the rank's shares are multiplied by: zero where they are dropped, else what makes up for it."""
    tensor, kept = local.operands[0].meta["val"], 1 - local.given("dropout_p")
    shape = [*local.whole_shape(0)[:-1], local.whole_shape(1)[-2]]
    ones = local.call(aten.ones.default, shape, dtype=tensor.dtype, device=tensor.device)
    drawn = local.call(aten.bernoulli.p, ones, kept)
    if part is not None:
        drawn = local.call(OWN_PART, drawn, part.dim, part.blocks, part.chunk, local.ranks, local.axis)
    return local.call(aten.div.Tensor, drawn, kept)
