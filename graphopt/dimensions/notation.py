"""Calls of operators, and the text that their signatures are written in.

``"... k, n k, n -> ... n"`` has a pattern for each tensor argument of the operator's schema, and for each result. A
pattern has a label for each dimension; ``...`` stands for any number of them, which align from the right. Dimensions of
size one have no label, whatever the text says: they are broadcast, or there is nothing to split.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import fx

from graphopt._torch import OpOverload, argument, declared_arguments
from graphopt.dimensions.signature import Dimension, Dimensions, Signature, operands_of

Shape = tuple[int, ...]  # symbols where sizes are dynamic


@dataclass(frozen=True)
class Call:
    """A node that calls an operator of torch, with what its signature depends on."""

    node: fx.Node
    target: OpOverload

    @cached_property
    def operands(self) -> tuple[Shape, ...]:
        return tuple(tuple(node.meta["val"].shape) for node in operands_of(self.node))

    @cached_property
    def results(self) -> tuple[Shape, ...]:
        value = self.node.meta.get("val")
        values = value if isinstance(value, (list, tuple)) else (value,)
        return tuple(tuple(item.shape) for item in values if isinstance(item, torch.Tensor))

    @cached_property
    def names(self) -> tuple[str, ...]:
        """For each operand, the argument that it is given as."""
        given = [*zip(declared_arguments(self.target), self.node.args, strict=False), *self.node.kwargs.items()]
        return tuple(name for name, value in given for _ in range(_tensors(value)))

    def __getitem__(self, name: str) -> Any:
        """What is given for an argument, or its default; None if the operator has none such."""
        return argument(self.target, name, self.node.args, self.node.kwargs)

    def shape(self, name: str) -> Shape | None:
        """The shape of an argument that is one tensor; None if it is not given."""
        return self.operands[self.names.index(name)] if name in self.names else None

    def operand(self, *names: str) -> frozenset[int]:
        """The operands that are given as arguments of these names."""
        return frozenset(index for index, name in enumerate(self.names) if name in names)


Rule = Callable[[Call], Signature | None]


def _tensors(value: Any) -> int:
    """How many tensors are given in an argument."""
    if isinstance(value, (list, tuple)):
        return sum(map(_tensors, value))
    return isinstance(value, fx.Node) and isinstance(value.meta.get("val"), torch.Tensor)


def is_one(size: int) -> bool:
    """Whether a dimension is known to have one element; a symbol is not."""
    return isinstance(size, int) and size == 1


@dataclass
class Labels:
    """Collects the sizes of labels while dimensions are named."""

    sizes: dict[str, int] = field(default_factory=dict)
    whole: set[str] = field(default_factory=set)
    contradictory: bool = False

    def name(self, label: str, size: int, *, whole: bool = False) -> Dimension:
        """The dimension that is `label`."""
        if is_one(size):
            return ()
        known = self.sizes.setdefault(label, size)
        if isinstance(known, int) and isinstance(size, int) and known != size:
            self.contradictory = True
        if whole:
            self.whole.add(label)
        return (label,)

    def apart(self, size: int) -> Dimension:
        """A dimension that cannot be split and has nothing to do with others."""
        return self.name(f"w{len(self.sizes)}", size, whole=True)

    def signature(
        self,
        operands: Iterable[Dimensions],
        results: Iterable[Dimensions],
        *,
        localized: Iterable[str] = (),
        addends: frozenset[int] = frozenset(),
        linear: Iterable[frozenset[int]] = (),
    ) -> Signature | None:
        """The signature with these labels; None if one of them would have several sizes.

        What is in some results but not in others is whole: parts would not be summands of these.
        """
        if self.contradictory:
            return None
        results = tuple(results)
        found = [{label for dimension in dimensions for label in dimension} for dimensions in results]
        whole = self.whole.union(*found) - (set.intersection(*found) - self.whole)
        local = frozenset(localized) & self.sizes.keys() - whole
        sets = tuple(indices for indices in linear if indices)
        return Signature(tuple(operands), results, self.sizes, frozenset(whole), local, addends, sets)


def positions(count: int) -> list[str]:
    """Labels of dimensions that are known by their position."""
    return [f"d{index}" for index in range(count)]


def spell(call: Call, text: str, **facts: Any) -> Signature | None:
    """The signature that `text` says a call has; None if its shapes do not fit. facts: of `fit`."""
    left, _, right = text.partition("->")
    arguments = [name for name, is_tensor in declared_arguments(call.target).items() if is_tensor]
    pattern = dict(zip(arguments, left.split(","), strict=False))
    if not all(name in pattern for name in call.names):
        return None
    return fit(
        call, [pattern[name].split() for name in call.names], [item.split() for item in right.split(",")], **facts
    )


def fit(
    call: Call,
    operands: Sequence[Sequence[str]],
    results: Sequence[Sequence[str]],
    *,
    whole: str = "",
    localized: str = "",
    addend: str = "",
    linear: Sequence[Collection[str]] = (),
) -> Signature | None:
    """The signature with a pattern for each operand and result; None if the shapes do not fit.

    whole, localized: labels, with ``...`` for all that it stands for. addend: an argument; linear: sets of arguments.
    """
    patterns, shapes = [*operands, *results], [*call.operands, *call.results]
    if len(patterns) != len(shapes):
        return None
    spans = [_span(pattern, shape) for pattern, shape in zip(patterns, shapes, strict=True)]
    every = positions(max([0, *spans]))
    labels = Labels()
    named: list[Dimensions] = []
    for pattern, span, shape in zip(patterns, spans, shapes, strict=True):
        at = pattern.index("...") if "..." in pattern else len(pattern)
        names = [*pattern[:at], *every[len(every) - max(0, span) :], *pattern[at + 1 :]]
        if len(names) != len(shape):
            return None
        named.append(tuple(map(labels.name, names, shape)))
    labels.whole.update(_listed(whole, every) & labels.sizes.keys())
    return labels.signature(
        named[: len(operands)],
        named[len(operands) :],
        localized=_listed(localized, every),
        addends=call.operand(addend),
        linear=[call.operand(*names) for names in linear],
    )


def _span(pattern: Sequence[str], shape: Shape) -> int:
    """The number of dimensions that ``...`` stands for."""
    return len(shape) - len(pattern) + 1 if "..." in pattern else 0


def _listed(text: str, every: Sequence[str]) -> set[str]:
    return {label for word in text.split() for label in (every if word == "..." else (word,))}


def spelled(text: str, **facts: Any) -> Rule:
    """The rule that gives every call the signature that `spell` reads from `text`."""
    return lambda call: spell(call, text, **facts)


def same_size(one: int, other: int) -> bool:
    """Whether two sizes are known to be equal; symbols compare as expressions, which adds no guard."""
    return one == other if isinstance(one, int) and isinstance(other, int) else str(one) == str(other)


def same_shape(one: Shape, other: Shape) -> bool:
    return len(one) == len(other) and all(map(same_size, one, other))
