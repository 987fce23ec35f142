"""Operators that give each element from the elements at the same place, of operands that broadcast."""

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import fx

from graphopt.dimensions.notation import Call, Labels, Rule, Shape, positions, same_shape, same_size, spelled
from graphopt.dimensions.signature import Dimensions, Signature

aten = torch.ops.aten
Linear = Sequence[Collection[str]]  # sets of arguments


def elementwise(call: Call) -> Signature | None:
    """``..., ... -> ...``, for any number of operands and results."""
    return broadcast(call, _linear_in(call))


def broadcast(call: Call, linear: Linear = (), *, localized: bool = False) -> Signature | None:
    """As `elementwise`; None if an operand cannot be broadcast to the results, or these differ.

    localized: whether no dimension can simply be split.
    """
    shape = next(iter(call.results), None)
    if shape is None or not all(same_shape(shape, other) for other in call.results):
        return None
    labels = Labels()
    operands = [aligned(labels, operand, shape) for operand in call.operands]
    result = aligned(labels, shape, shape)
    every = positions(len(shape)) if localized else ()
    sets = [call.operand(*names) for names in linear]
    return labels.signature(operands, [result] * len(call.results), localized=every, linear=sets)


def aligned(labels: Labels, operand: Shape, result: Shape) -> Dimensions:
    """Labels of an operand that is broadcast to a result, which is labelled by position."""
    places = positions(len(result))[max(0, len(result) - len(operand)) :]
    if len(places) != len(operand):
        labels.contradictory = True
    return tuple(labels.name(place, size) for place, size in zip(places, operand, strict=False))


def random(call: Call) -> Signature | None:
    """What is drawn for the whole is not what parts would draw."""
    return broadcast(call, localized=True)


def dropout(call: Call) -> Signature | None:
    """Random in training alone."""
    off = call["p"] == 0 or call["train"] is False
    return broadcast(call, (("input",),) if off else (), localized=not off)


def shape_alone(call: Call) -> Signature | None:
    """An operand that only says what the result looks like: its dimensions are those of the result where they agree."""
    (operand, *_), (result,) = call.operands, call.results
    labels = Labels()
    named = tuple(labels.name(place, size) for place, size in zip(positions(len(result)), result, strict=True))
    agrees = len(operand) == len(result)
    first = tuple(
        named[at] if agrees and same_size(size, result[at]) else labels.apart(size) for at, size in enumerate(operand)
    )
    others = [tuple(labels.apart(size) for size in other) for other in call.operands[1:]]
    return labels.signature([first, *others], [named])


def of_first(call: Call) -> Signature | None:
    """The first operand, in the dtype of the second, whose shape does not matter."""
    first, second = call.operands
    labels = Labels()
    named = aligned(labels, first, first)
    other = named if same_shape(first, second) else tuple(labels.apart(size) for size in second)
    return labels.signature([named, other], [named], linear=[call.operand("self")])


def constant(call: Call) -> Signature | None:
    """``-> ...``: the same everywhere, so that parts of it are made as such."""
    return broadcast(call)


def ordered(call: Call) -> Signature | None:
    """Made of no tensor, and each element knows its place."""
    labels = Labels()
    results = [tuple(labels.apart(size) for size in shape) for shape in call.results]
    return labels.signature((), results)


def triangle(call: Call) -> Signature | None:
    """Zeros above or below a diagonal of the last two dimensions."""
    (shape,) = call.operands
    labels = Labels()
    named = aligned(labels, shape, shape)
    labels.whole.update(label for dimension in named[-2:] for label in dimension)
    return labels.signature([named], [named], linear=[frozenset({0})])


def _linear_in(call: Call) -> Linear:
    """Sets of arguments in which an operator is known to be linear."""
    packet = call.target.overloadpacket
    numbers = packet in _JOINED and not {"self", "other"} <= set(call.names)  # added to, or put into, each summand
    rounded = packet in _ROUNDING and call["rounding_mode"] is not None
    filled = packet is aten.masked_fill and (isinstance(call["value"], fx.Node) or call["value"] != 0)
    return () if numbers or rounded or filled else _LINEAR.get(packet, ())


_JOINED = frozenset({aten.add, aten.sub, aten.rsub, aten.subtract, aten.where})
_ROUNDING = frozenset({aten.div, aten.divide})
_EACH: Linear = (("self",), ("other",))
_JOINTLY: Linear = (("self", "other"),)
_FIRST: Linear = (("self",),)
_LINEAR: Mapping[object, Linear] = {
    **dict.fromkeys((aten.add, aten.sub, aten.rsub, aten.subtract, aten.where), _JOINTLY),
    **dict.fromkeys((aten.mul, aten.multiply), _EACH),
    **dict.fromkeys((aten.div, aten.divide, aten.true_divide), _FIRST),
    **dict.fromkeys((aten.neg, aten.clone, aten._to_copy, aten.to, aten.contiguous, aten.alias), _FIRST),
    **dict.fromkeys((aten.detach, aten.masked_fill, aten.real, aten.imag), _FIRST),
    aten.lerp: (("self", "end"),),
}
# Of those that are not tagged as pointwise.
_UNTAGGED = (
    aten.__and__, aten.__or__, aten.__xor__, aten._to_copy, aten.alias, aten.contiguous, aten.copy, aten.detach,
    aten.divide, aten.fill, aten.floor_divide, aten.imag, aten.lift_fresh_copy, aten.log_sigmoid, aten.masked_fill,
    aten.multiply, aten.real, aten.rsub, aten.subtract, aten.to, aten.where,
)  # fmt: skip

RULES: Mapping[object, Rule] = {
    **dict.fromkeys(_UNTAGGED, elementwise),
    **dict.fromkeys((aten.empty_like, aten.full_like, aten.ones_like, aten.zeros_like), constant),
    **dict.fromkeys((aten.empty, aten.full, aten.ones, aten.scalar_tensor, aten.zeros), constant),
    **dict.fromkeys(
        (aten.arange, aten.eye, aten.linspace, aten.logspace, aten.tril_indices, aten.triu_indices), ordered
    ),
    **dict.fromkeys((aten.rand, aten.randint, aten.randn, aten.randperm), ordered),
    **dict.fromkeys((aten.new_empty, aten.new_full, aten.new_ones, aten.new_zeros), shape_alone),
    **dict.fromkeys((aten.bernoulli, aten.rand_like, aten.randint_like, aten.randn_like), random),
    **dict.fromkeys((aten.alpha_dropout, aten.dropout, aten.native_dropout), dropout),
    **dict.fromkeys((aten.tril, aten.triu), triangle),
    aten.prelu: spelled("n c ..., c -> n c ..."),
    aten.type_as: of_first,
}
