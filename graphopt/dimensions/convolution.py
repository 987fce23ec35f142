"""Convolutions, and pooling, over one to three dimensions of space."""

from collections.abc import Mapping

import torch

from graphopt.dimensions.notation import Call, Labels, Rule, Shape
from graphopt.dimensions.signature import Dimension, Dimensions, Signature

aten = torch.ops.aten


def convolution(call: Call) -> Signature | None:
    """``n (g i) ..., (g o) i ..., (g o) -> n (g o) ...``, where space is whole.

    Groups are parts that have nothing to do with each other; of a depthwise convolution each channel is one.
    """
    return _convolution(call, transposed=bool(call["transposed"]))


def transposed_convolution(call: Call) -> Signature | None:
    """``n (g i) ..., (g i) o ..., (g o) -> n (g o) ...``."""
    return _convolution(call, transposed=True)


def _convolution(call: Call, *, transposed: bool) -> Signature | None:
    (image, weight), (result,) = call.operands[:2], call.results
    groups = call["groups"]
    space = len(weight) - 2
    inner, outer = (weight[0] // groups, weight[1]) if transposed else (weight[1], weight[0] // groups)
    labels = Labels()
    group, i, o = labels.name("g", groups), labels.name("i", inner), labels.name("o", outer)

    def named(shape: Shape, channels: Dimension) -> Dimensions:
        batch = tuple(labels.name("n", size) for size in shape[: len(shape) - space - 1])
        return (*batch, channels, *map(labels.apart, shape[len(shape) - space :]))

    kernel = (group + i, o) if transposed else (group + o, i)
    operands = [named(image, group + i), (*kernel, *map(labels.apart, weight[2:]))]
    operands += [(group + o,)] * (len(call.operands) - 2)
    return labels.signature(
        operands,
        [named(result, group + o)],
        addends=call.operand("bias"),
        linear=[call.operand("input", "bias"), call.operand("weight", "bias")],
    )


def pooling(space: int, *, linear: bool = False) -> Rule:
    """``... s -> ... t``, where the last dimensions are those of space, and whole."""

    def rule(call: Call) -> Signature | None:
        (before,) = call.operands
        labels = Labels()
        rest = tuple(labels.name(f"d{at}", size) for at, size in enumerate(before[: len(before) - space]))
        operand = (*rest, *map(labels.apart, before[len(before) - space :]))
        results = [(*rest, *map(labels.apart, after[len(after) - space :])) for after in call.results]
        return labels.signature([operand], results, linear=[frozenset({0})] if linear else ())

    return rule


_SPACES = (1, 2, 3)


def _of_spaces(name: str, *, linear: bool = False) -> dict[object, Rule]:
    return {getattr(aten, name.format(space)): pooling(space, linear=linear) for space in _SPACES}


RULES: Mapping[object, Rule] = {
    **dict.fromkeys((aten.conv1d, aten.conv2d, aten.conv3d, aten.convolution), convolution),
    **dict.fromkeys((aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d), transposed_convolution),
    **_of_spaces("avg_pool{}d", linear=True),
    **_of_spaces("adaptive_avg_pool{}d", linear=True),
    **_of_spaces("max_pool{}d"),
    **_of_spaces("adaptive_max_pool{}d"),
    **_of_spaces("upsample_nearest{}d", linear=True),
    aten.max_pool2d_with_indices: pooling(2),
    aten.max_pool3d_with_indices: pooling(3),
    aten.upsample_bilinear2d: pooling(2, linear=True),
    aten.upsample_bicubic2d: pooling(2, linear=True),
}
