"""What may be computed again in backward, rather than saved."""

import operator
from collections.abc import Callable
from typing import Any

from torch import fx

from graphopt.ir import Effect, Phase, Program, effect_of, facts_of
from graphopt.ir.context import ATTEND


def repeatable(program: Program, group: Callable[[fx.Node], Any], is_kept: Callable[[fx.Node], bool]) -> set[fx.Node]:
    """The pure calls of forward that are not kept, and that forward reads only within the group they belong to.

    What goes from one group to the next is saved, so that repeating one does not take repeating those before it. What
    is random, communicates or has another effect is kept, and so are the items of what is kept. Attention to gathered
    keys is too, for what was gathered would be, and is more than what it gives.
    """
    kept: set[fx.Node] = set()
    found: set[fx.Node] = set()
    for node in program.compute_nodes(Phase.FORWARD):
        is_item_of_kept = node.target is operator.getitem and node.args[0] in kept
        if effect_of(node) is not Effect.PURE or node.target is ATTEND or is_item_of_kept or is_kept(node):
            kept.add(node)
        elif all(group(user) == group(node) for user in node.users if _is_forward(user)):
            found.add(node)
    return found


def _is_forward(node: fx.Node) -> bool:
    return node.op != "output" and facts_of(node).phase is Phase.FORWARD
