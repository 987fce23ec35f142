"""Operators that take statistics along dimensions, and keep the shape."""

from collections.abc import Mapping

import torch

from graphopt.dimensions.elementwise import aligned
from graphopt.dimensions.notation import Call, Labels, Rule, positions, spell
from graphopt.dimensions.signature import Dimensions, Signature

aten = torch.ops.aten


def layer_norm(call: Call) -> Signature | None:
    """``... n, n, n -> ... n``, with as many `n` as are normalized; and statistics, if given, which have none."""
    shape = call.operands[0]
    labels = Labels()
    named = aligned(labels, shape, shape)
    rest = len(shape) - len(call["normalized_shape"])
    labels.whole.update(label for dimension in named[rest:] for label in dimension)
    statistics = (*named[:rest], *[()] * (len(shape) - rest))
    operands = [named, *[named[rest:]] * (len(call.operands) - 1)]
    return labels.signature(operands, [named, *[statistics] * (len(call.results) - 1)])


def group_norm(call: Call) -> Signature | None:
    """``n c ..., c, c -> n c ...``: groups are not told apart."""
    space = " ".join(positions(len(call.operands[0]) - 2))
    return spell(call, f"n c {space}, c, c -> n c {space}", whole=f"c {space}")


def batch_norm(call: Call) -> Signature | None:
    """``n c ..., c, c, c, c -> n c ...``: statistics are over batch and space, unless they are given."""
    taken = call["use_input_stats"] if call["use_input_stats"] is not None else call["training"]
    labels = Labels()
    shape = call.operands[0]
    named = aligned(labels, shape, shape)
    if taken:
        alone = call.target.overloadpacket is not aten.instance_norm
        over = [*named[:1], *named[2:]] if alone else named[2:]
        labels.whole.update(label for dimension in over for label in dimension)
    channel = named[1:2]

    def per_channel(size: int) -> Dimensions:
        return channel if size else (labels.apart(size),)  # evaluation gives no statistics

    operands = [named, *(per_channel(each[0]) for each in call.operands[1:])]
    return labels.signature(operands, [named, *(per_channel(each[0]) for each in call.results[1:])])


def softmax(call: Call) -> Signature | None:
    """``... k -> ... k``, where `k` is whole."""
    (shape,) = call.operands
    labels = Labels()
    named = aligned(labels, shape, shape)
    if shape:
        labels.whole.update(named[call["dim"]])
    return labels.signature([named], [named])


RULES: Mapping[object, Rule] = {
    **dict.fromkeys((aten.layer_norm, aten.native_layer_norm, aten.rms_norm, aten._fused_rms_norm), layer_norm),
    **dict.fromkeys((aten.batch_norm, aten._native_batch_norm_legit_functional, aten.instance_norm), batch_norm),
    **dict.fromkeys((aten.softmax, aten._softmax, aten._safe_softmax, aten.log_softmax, aten._log_softmax), softmax),
    aten.group_norm: group_norm,
}
