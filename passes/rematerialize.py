"""rematerialize: compute activations again in backward instead of saving them (Chen et al. 2016).

What is computed again is pure: random numbers, collectives and values of anything with an effect are saved. It runs
before `zero`, which then gathers, for backward, the parameters that it reads there.
"""

import fnmatch
import operator
from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from graphopt.cost.operations import contraction_flops
from graphopt.errors import PassError
from graphopt.ir import Effect, Level, Phase, Program, effect_of, facts_of
from graphopt.nearest import nearest
from graphopt.passes.base import Pass, PassContext
from graphopt.passes.build import Builder
from graphopt.passes.repeat import repeat_in_backward

POLICIES = ("full", "selective")


@dataclass(frozen=True)
class RematerializeOptions:
    """policy: ``full`` keeps the inputs of each repeated layer; ``selective`` also matrix products and attention.

    keep: patterns of module paths (as in fnmatch), joined by ``|``, whose values are saved in any case.
    """

    policy: str = "full"
    keep: str = ""

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise PassError(f"rematerialize: there is no policy {self.policy!r}; {nearest(self.policy, POLICIES)}")


class Rematerialize(Pass):
    """Drop what forward saves of the repeated layers, and compute it again where backward needs it."""

    name = "rematerialize"
    Options = RematerializeOptions
    level = Level.STEP
    produces = Level.STEP
    requires = frozenset({"differentiate"})
    conflicts = frozenset({"rematerialize", "zero"})
    keeps_values = True

    def run(self, program: Program, context: PassContext) -> bool:
        backward = program.compute_nodes(Phase.BACKWARD)
        if backward and all(facts_of(node).layer is None for node in program.compute_nodes(Phase.FORWARD)):
            raise PassError("rematerialize: the model has no repeated layers, so there is nothing to compute again")
        dropped = list(self._dropped(program))
        reason = f"policy={self.options.policy} computes it again for backward, so that it is not saved"
        repeated = repeat_in_backward(Builder(program, context, self.name), dropped, reason)
        context.statistics.update(repeated=repeated)
        return repeated > 0

    def _dropped(self, program: Program) -> Iterator[fx.Node]:
        """The calls that backward may repeat: inside one layer, and asked for by nothing outside it."""
        patterns = self.options.keep.split("|") if self.options.keep else []
        kept: set[fx.Node] = set()
        for node in program.compute_nodes(Phase.FORWARD):
            if not _is_repeatable(node, kept) or self._is_kept(node, patterns):
                kept.add(node)
            elif not _leaves_layer(node):
                yield node

    def _is_kept(self, node: fx.Node, patterns: list[str]) -> bool:
        if self.options.policy == "selective" and contraction_flops(node) is not None:
            return True
        return any(fnmatch.fnmatchcase(facts_of(node).module, pattern) for pattern in patterns)


def _is_repeatable(node: fx.Node, kept: set[fx.Node]) -> bool:
    """Pure, in a repeated layer; an item of a list goes with the list, which is nothing to save."""
    if effect_of(node) is not Effect.PURE or facts_of(node).layer is None:
        return False
    return not (node.target is operator.getitem and node.args[0] in kept)


def _leaves_layer(node: fx.Node) -> bool:
    """Whether forward reads a value outside the layer that makes it: what a layer gives to the next is saved."""
    layer = facts_of(node).layer
    return any(
        user.op != "output" and facts_of(user).phase is Phase.FORWARD and facts_of(user).layer != layer
        for user in node.users
    )
