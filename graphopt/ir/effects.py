"""What running a node does besides computing its value, and so what a pass may do with it."""

import enum
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from graphopt._torch import OpOverload, aliases_argument, argument, is_mutating, returns_nothing
from graphopt.ir.context import COMMUNICATING
from graphopt.ir.copies import COPIES
from graphopt.ir.dispatch import ROWS_BACK, ROWS_OUT


class Effect(enum.Enum):
    """A pass may move or repeat pure nodes only."""

    PURE = "pure"
    RANDOM = "random"  # draws from a generator: never repeated unless its state is replayed
    MUTATING = "mutating"  # writes one of its arguments
    COLLECTIVE = "collective"  # one order on every rank
    COPY = "copy"  # to memory elsewhere, or back: launched once, waited for once
    HOST = "host"  # assertions, printing, reading a value on the host


_COLLECTIVE_NAMESPACES = frozenset({"_c10d_functional", "c10d_functional", "_c10d_functional_autograd", "c10d"})
_COLLECTIVES = COMMUNICATING | {ROWS_OUT, ROWS_BACK}


def effect_of(node: fx.Node) -> Effect:
    """The effect of a call node, read from its operator's schema and tags."""
    target = node.target
    if target is operator.getitem:
        return Effect.PURE
    if not isinstance(target, OpOverload):
        return (
            Effect.PURE
            if callable(target) and getattr(target, "__module__", "") in ("_operator", "math")
            else Effect.HOST
        )
    if target.namespace in _COLLECTIVE_NAMESPACES or target in _COLLECTIVES:
        return Effect.COLLECTIVE
    if target in COPIES:
        return Effect.COPY
    if draws(target, node.args, node.kwargs):
        return Effect.RANDOM
    if is_mutating(target):
        return Effect.MUTATING
    if returns_nothing(target):
        return Effect.HOST
    return Effect.PURE


def draws(target: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call takes random numbers. Attention without dropout takes none, though its operator might."""
    return torch.Tag.nondeterministic_seeded in target.tags and argument(target, "dropout_p", args, kwargs) != 0


def is_view(node: fx.Node) -> bool:
    """True if the node's result shares storage with an argument."""
    target = node.target
    if target is operator.getitem:
        return True
    return isinstance(target, OpOverload) and aliases_argument(target)


def stops_gradient(node: fx.Node) -> bool:
    """True if no gradient flows from the node's result to its argument, though both are one value."""
    return node.target is torch.ops.aten.detach.default
