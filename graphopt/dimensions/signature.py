"""How the dimensions of an operator's results follow from those of its operands.

A dimension is a product of labelled factors, outermost first, as in einops (Rogozhnikov 2022): ``[b, s, h*d]`` seen as
``[b, s, h, d]`` is ``b s (h d) -> b s h d``. Split along a label, the operator gives on each part what it gives on the
whole there:

    carried    the label is in operands and in results: each part of the operands gives that part of the results
    reduced    it is in operands alone: each part gives a summand of the results
    whole      the operator needs all of it at once

An operand without the label is needed whole by every part; unless it is an addend (a bias), which only one part of a
reduced label may add.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import fx

Dimension = tuple[str, ...]
Dimensions = tuple[Dimension, ...]


@dataclass(frozen=True)
class Signature:
    """One call. operands: of each tensor argument, in the order of `operands_of`; results: of each tensor result.

    sizes: of each label. whole: labels that cannot be split. localized: labels along which the operator itself cannot
    run on parts, though it can be computed by parts otherwise (a lookup in a part of a table).
    addends: operands that are added to what the others give.
    linear: sets of operands in which the results are linear when the other operands are fixed.
    matched: whole labels of which operands are taken in balanced parts, by the label that is cut so.
    """

    operands: tuple[Dimensions, ...]
    results: tuple[Dimensions, ...]
    sizes: Mapping[str, int]
    whole: frozenset[str] = frozenset()
    localized: frozenset[str] = frozenset()
    addends: frozenset[int] = frozenset()
    linear: tuple[frozenset[int], ...] = field(default=())
    matched: Mapping[str, str] = field(default_factory=dict)

    @property
    def labels(self) -> tuple[str, ...]:
        """Those that may be split, in order of appearance."""
        every = (label for dimensions in (*self.operands, *self.results) for dim in dimensions for label in dim)
        return tuple(dict.fromkeys(label for label in every if label not in self.whole))

    def is_reduced(self, label: str) -> bool:
        """Whether parts along `label` are summands."""
        return not any(label in dim for dimensions in self.results for dim in dimensions)


def operands_of(node: fx.Node) -> list[fx.Node]:
    """The arguments of a call that are tensors, in order, each as often as it is given."""
    found: list[fx.Node] = []

    def note(argument: fx.Node) -> fx.Node:
        if isinstance(argument.meta.get("val"), torch.Tensor):
            found.append(argument)
        return argument

    fx.map_arg((node.args, node.kwargs), note)
    return found
