"""rematerialize: compute activations again in backward instead of saving them (Chen et al. 2016).

What is computed again is pure: random numbers, collectives and values of anything with an effect are saved. It runs
before `zero`, which then gathers, for backward, the parameters that it reads there.
"""

import fnmatch
from dataclasses import dataclass

from torch import fx

from graphopt.cost.operations import contraction_flops
from graphopt.errors import PassError
from graphopt.ir import Level, Phase, Program, facts_of
from graphopt.nearest import nearest
from graphopt.passes.base import Pass, PassContext
from graphopt.passes.budget import Budget, choose
from graphopt.passes.build import Builder
from graphopt.passes.repeat import repeat_in_backward
from graphopt.passes.repeatable import repeatable
from graphopt.sizes import readable_size

POLICIES = ("full", "selective", "budget")


@dataclass(frozen=True)
class RematerializeOptions:
    """policy: ``full`` keeps the inputs of each repeated layer; ``selective`` also matrix products and attention;
        ``budget`` what lets the step fit into bytes, at the least cost in time.
    bytes: what the step may hold at its peak. share: of what it saves, 1 for all of that. A budget has one of them.
    keep, keep_ops: patterns of module paths and of operators (as in fnmatch), joined by ``|``, whose values are saved
        in any case.
    """

    policy: str = "full"
    bytes: int | None = None
    share: float | None = None
    keep: str = ""
    keep_ops: str = ""

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise PassError(f"rematerialize: there is no policy {self.policy!r}; {nearest(self.policy, POLICIES)}")
        limits = [limit for limit in (self.bytes, self.share) if limit is not None]
        if len(limits) != (self.policy == "budget"):
            raise PassError("rematerialize: bytes or share, one of them, goes with policy=budget and with no other")


class Rematerialize(Pass):
    """Drop what forward saves, and compute it again where backward needs it."""

    name = "rematerialize"
    Options = RematerializeOptions
    level = Level.STEP
    produces = Level.STEP
    requires = frozenset({"differentiate"})
    conflicts = frozenset({"rematerialize", "zero"})
    keeps_values = True

    def run(self, program: Program, context: PassContext) -> bool:
        if not program.compute_nodes(Phase.BACKWARD):
            return False
        options = self.options
        nodes = repeatable(program, lambda node: facts_of(node).layer, self._is_kept)
        reason = f"policy={options.policy} computes it again for backward, so that it is not saved"
        if options.policy == "budget":
            choice = choose(program, context, nodes, Budget(options.bytes, options.share))
            nodes = choice.repeated
            context.statistics.update(limit_bytes=choice.limit, peak_bytes=choice.peak_bytes)
            reason = f"a step within {readable_size(choice.limit)} has no room to save it: it is computed again"
        elif all(facts_of(node).layer is None for node in program.compute_nodes(Phase.FORWARD)):
            raise PassError("rematerialize: the model has no repeated layers, so there is nothing to compute again")
        else:
            nodes = {node for node in nodes if facts_of(node).layer is not None}
        repeated = repeat_in_backward(Builder(program, context, self.name), nodes, reason)
        context.statistics.update(repeated=repeated)
        return repeated > 0

    def _is_kept(self, node: fx.Node) -> bool:
        if self.options.policy == "selective" and contraction_flops(node) is not None:
            return True
        return _matches(facts_of(node).module, self.options.keep) or _matches(str(node.target), self.options.keep_ops)


def _matches(name: str, patterns: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns.split("|"))
