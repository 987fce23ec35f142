"""The signature of every operator that is known."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import fx

from graphopt._torch import OpOverload
from graphopt.dimensions import (
    attention,
    convolution,
    elementwise,
    kernels,
    lookup,
    matrix,
    moves,
    normalization,
    reductions,
    views,
)
from graphopt.dimensions.notation import Call, Rule
from graphopt.dimensions.signature import Signature, operands_of

_RULES: Mapping[object, Rule] = {
    **elementwise.RULES,
    **views.RULES,
    **matrix.RULES,
    **reductions.RULES,
    **normalization.RULES,
    **attention.RULES,
    **lookup.RULES,
    **convolution.RULES,
    **moves.RULES,
}
_BY_NAME: Mapping[str, Rule] = {**matrix.BY_NAME, **kernels.BY_NAME}


def signature_of(node: fx.Node) -> Signature | None:
    """The signature of a call of an operator; None if none is known.

    Items of lists and computations with sizes give no tensor of their own, and have none. Symbolic sizes are compared
    as expressions, which adds no guard.
    """
    if node.op != "call_function" or not isinstance(node.target, OpOverload):
        return None
    call = Call(node, node.target)
    rule = _rule_of(node.target)
    found = None if rule is None or not call.results else rule(call)
    return found and replace(found, linear=_of_floats(node, found))


def _of_floats(node: fx.Node, signature: Signature) -> tuple[frozenset[int], ...]:
    """The sets of operands in which a call is linear, none if numbers are rounded: sums are of floating numbers."""
    values = node.meta["val"] if isinstance(node.meta["val"], (list, tuple)) else (node.meta["val"],)
    if not all(value.is_floating_point() for value in values if isinstance(value, torch.Tensor)):
        return ()
    floating = [operand.meta["val"].is_floating_point() for operand in operands_of(node)]
    return tuple(operands for operands in signature.linear if all(floating[index] for index in operands))


def _rule_of(target: OpOverload) -> Rule | None:
    rule = _RULES.get(target.overloadpacket) or _BY_NAME.get(target.name().partition(".")[0])
    if rule is None and torch.Tag.pointwise in target.tags:
        drawn = torch.Tag.nondeterministic_seeded in target.tags
        return elementwise.random if drawn else elementwise.elementwise
    return rule
