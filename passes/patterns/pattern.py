"""Patterns of calls: how a computation may be written in a graph, up to the order of operands, casts and views.

A pattern takes a value, a node or a number, and what is found so far, and yields what is found with it: nothing where
the value is not as it says, several where it can be read in several ways.
"""

import dataclasses
import itertools
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import fx

from graphopt._torch import OpOverload, argument
from graphopt.dimensions.notation import same_size

aten = torch.ops.aten
_CASTS = frozenset({aten._to_copy, aten.type_as})
_RESHAPES = frozenset({aten.reshape, aten.view, aten._unsafe_view})
_COMMUTATIVE = frozenset({aten.add, aten.mul})
_ROUNDING = 1e-6  # of constants, which authors write with some digits


@dataclass(frozen=True)
class Found:
    """bound: what names stand for, nodes or constants. inner: calls that are read through, and computed no more."""

    bound: Mapping[str, Any] = field(default_factory=dict)
    inner: frozenset[fx.Node] = frozenset()

    def __getitem__(self, name: str) -> Any:
        return self.bound.get(name)

    def binding(self, name: str, value: Any) -> "Found":
        return dataclasses.replace(self, bound={**self.bound, name: value})

    def through(self, *nodes: fx.Node) -> "Found":
        return dataclasses.replace(self, inner=self.inner.union(nodes))


Pattern = Callable[[Any, Found], Iterator[Found]]


def packet_of(value: Any) -> Any:
    """The operator of a call, whichever its overload; None if it is not one."""
    return value.target.overloadpacket if isinstance(value, fx.Node) and isinstance(value.target, OpOverload) else None


def dtype_of(node: fx.Node) -> torch.dtype:
    dtype: torch.dtype = node.meta["val"].dtype
    return dtype


def cast_source(value: Any) -> fx.Node | None:
    """What a call casts from one floating dtype to another on the same device; None if it is no such call."""
    if packet_of(value) not in _CASTS:
        return None
    source, kwargs = value.args[0], value.kwargs
    given, made = source.meta["val"], value.meta["val"]
    is_floating = given.is_floating_point() and made.is_floating_point()
    is_alone = value.target is aten.type_as.default or kwargs.keys() <= {"dtype", "device"}
    return source if is_floating and is_alone and given.device == made.device else None


def widened_source(value: Any) -> fx.Node | None:
    """What a call casts to a dtype in which all its numbers are exact; None if it is no such call."""
    source = cast_source(value)
    return source if source is not None and _is_wider(value, source) else None


def uncast(value: Any) -> Any:
    """A value before all casts."""
    while (source := cast_source(value)) is not None:
        value = source
    return value


def item_source(value: Any, index: int, target: Any) -> fx.Node | None:
    """The call of an operator that a value is an item of; None if it is no such item."""
    is_item = isinstance(value, fx.Node) and value.target is operator.getitem and value.args[1] == index
    return value.args[0] if is_item and packet_of(value.args[0]) is target else None


def items_of(node: fx.Node, index: int) -> list[fx.Node]:
    """The nodes that are an item of what a call gives."""
    return [user for user in node.users if user.target is operator.getitem and user.args[1] == index]


def argument_of(node: fx.Node, name: str) -> Any:
    """What a call is given for the argument of that name, or its default."""
    return argument(node.target, name, node.args, node.kwargs)  # type: ignore[arg-type]


def is_last(dim: Any, like: fx.Node) -> bool:
    """Whether a dimension is the last of a value."""
    return dim in (-1, like.meta["val"].dim() - 1)


def casts_between(value: fx.Node, source: fx.Node) -> Iterator[fx.Node]:
    """The casts that make a value of what `uncast` found."""
    while value is not source:
        yield value
        before = cast_source(value)
        assert before is not None
        value = before


def reshape_source(value: Any) -> fx.Node | None:
    """What a call gives in another shape with rows of the same width; None if it is no such call."""
    if packet_of(value) not in _RESHAPES:
        return None
    source: fx.Node = value.args[0]
    given, made = source.meta["val"].shape, value.meta["val"].shape
    return source if len(given) and len(made) and same_size(given[-1], made[-1]) else None


@dataclass(frozen=True)
class Part:
    """The elements at `indices` of each row of `source`, and the calls that take them."""

    source: fx.Node
    indices: range
    calls: tuple[fx.Node, ...]


def part_of(value: Any) -> Part | None:
    """What a slice along the last dimension, or an item of a split along it, is a part of."""
    if packet_of(value) is aten.slice:
        given: tuple[Any, ...] = (*value.args, *(0, 0, None, 1)[len(value.args) - 1 :])
        source, dim, start, stop, step = given
        width = source.meta["val"].shape[-1]
        is_last = dim in (-1, source.meta["val"].dim() - 1) and isinstance(width, int)
        return Part(source, range(width)[start:stop:step], (value,)) if is_last else None
    if isinstance(value, fx.Node) and value.target is operator.getitem and packet_of(value.args[0]) is aten.split:
        split, index = cast(tuple[fx.Node, int], value.args)
        of_split: tuple[Any, ...] = (*split.args, *(0,)[len(split.args) - 2 :])
        source, size, dim = of_split
        width = source.meta["val"].shape[-1]
        is_last = dim in (-1, source.meta["val"].dim() - 1) and isinstance(width, int) and isinstance(size, int)
        return Part(source, range(width)[index * size : (index + 1) * size], (value, split)) if is_last else None
    return None


def bind(name: str) -> Pattern:
    """Any tensor, or where the name stands for one already, that one; with or without casts that lose nothing."""

    def match(value: Any, found: Found) -> Iterator[Found]:
        if not isinstance(value, fx.Node) or not isinstance(value.meta.get("val"), torch.Tensor):
            return
        before = [value]
        while (source := widened_source(before[-1])) is not None:
            before.append(source)
        if name not in found.bound:
            yield from (found.binding(name, each) for each in reversed(before))
        elif found[name] in before:
            yield found

    return match


def number(name: str) -> Pattern:
    """A constant number."""

    def match(value: Any, found: Found) -> Iterator[Found]:
        if type(value) in (int, float) and name not in found.bound:
            yield found.binding(name, float(value))

    return match


def constant(name: str) -> Pattern:
    """Anything but a tensor."""
    return lambda value, found: iter(() if isinstance(value, fx.Node) else (found.binding(name, value),))


def exactly(wanted: Any) -> Pattern:
    """This constant; numbers but for their last digits."""

    def match(value: Any, found: Found) -> Iterator[Found]:
        if isinstance(value, fx.Node):
            return
        if type(wanted) in (int, float) and type(value) in (int, float):
            if math.isclose(value, wanted, rel_tol=_ROUNDING):
                yield found
        elif type(value) is type(wanted) and value == wanted:
            yield found

    return match


def either(*patterns: Pattern) -> Pattern:
    """One of several ways to write the same."""

    def match(value: Any, found: Found) -> Iterator[Found]:
        for pattern in patterns:
            yield from pattern(value, found)

    return match


def stating(name: str, value: Any, pattern: Pattern) -> Pattern:
    """The pattern; the name then stands for a constant that says which it was."""
    return lambda given, found: pattern(given, found.binding(name, value))


def named(name: str, pattern: Pattern) -> Pattern:
    """The pattern; the name then stands for its value, casts included."""
    return lambda value, found: (each.binding(name, value) for each in pattern(value, found))


def reshaped(pattern: Pattern) -> Pattern:
    """The pattern, or a view of it with rows of the same width."""

    def match(value: Any, found: Found) -> Iterator[Found]:
        yield from pattern(value, found)
        source = reshape_source(uncast(value))
        if source is not None:
            yield from pattern(source, found.through(*casts(value), uncast(value)))

    return match


def call(target: Any, *operands: Pattern, **options: Pattern) -> Pattern:
    """A call of an operator, of any overload, with these operands in any order where that makes no difference.

    Casts of what it gives are read through. options: arguments by keyword; without others.
    """

    def match(value: Any, found: Found) -> Iterator[Found]:
        node = uncast(value)
        if packet_of(node) is not target or len(node.args) != len(operands) or node.kwargs.keys() != options.keys():
            return
        inside = found.through(*casts(value), node)
        orders = itertools.permutations(node.args) if target in _COMMUTATIVE else [node.args]
        for order in orders:
            arguments = [*order, *(node.kwargs[name] for name in options)]
            yield from _all_match([*operands, *options.values()], arguments, inside)

    return match


def product(*factors: Pattern, scale: float = 1.0) -> Pattern:
    """A number times some factors, in any order and grouping; small powers count as products."""

    def match(value: Any, found: Found) -> Iterator[Found]:
        for constant, nodes, inner in _factorings(value, len(factors)):
            if inner and math.isclose(constant, scale, rel_tol=_ROUNDING):
                for order in dict.fromkeys(itertools.permutations(nodes)):
                    yield from _all_match(factors, order, found.through(*inner))

    return match


def _all_match(patterns: Any, values: Any, found: Found) -> Iterator[Found]:
    if not patterns:
        yield found
        return
    for each in patterns[0](values[0], found):
        yield from _all_match(patterns[1:], values[1:], each)


_Factoring = tuple[float, tuple[fx.Node, ...], tuple[fx.Node, ...]]


def _factorings(value: Any, count: int) -> Iterator[_Factoring]:
    """Ways to read a value as a number times `count` tensors, each with the calls that are read through for it."""
    if not isinstance(value, fx.Node):
        if count == 0 and type(value) in (int, float):
            yield float(value), (), ()
        return
    if count == 0:
        return
    if count == 1:
        yield 1.0, (value,), ()
    target, args = packet_of(value), value.args
    source = cast_source(value)
    if source is not None:
        yield from _through(value, _factorings(source, count))
    elif target is aten.mul and len(args) == 2:
        for left in range(count + 1):
            shares = list(zip(args, (left, count - left), strict=True))
            if all(share or not isinstance(factor, fx.Node) for factor, share in shares):  # a tensor has a share
                for one, other in itertools.product(*(_factorings(*each) for each in shares)):
                    yield one[0] * other[0], one[1] + other[1], (*one[2], *other[2], value)
    elif target is aten.div and len(args) == 2 and not isinstance(args[1], fx.Node) and not value.kwargs:
        for scale, nodes, inner in _through(value, _factorings(args[0], count)):
            yield scale / cast(float, args[1]), nodes, inner
    elif (target is aten.pow and args[1] == count) or (target is aten.square and count == 2):
        yield 1.0, (args[0],) * count, (value,)  # type: ignore[misc]


def _through(node: fx.Node, factorings: Iterator[_Factoring]) -> Iterator[_Factoring]:
    return ((scale, nodes, (*inner, node)) for scale, nodes, inner in factorings)


def casts(value: Any) -> Iterator[fx.Node]:
    """The casts that a value goes through last."""
    while (source := cast_source(value)) is not None:
        yield value
        value = source


def _is_wider(one: fx.Node, other: fx.Node) -> bool:
    """Whether all numbers of the dtype of `other` are exact in that of `one`."""
    return torch.promote_types(dtype_of(one), dtype_of(other)) == dtype_of(one)
