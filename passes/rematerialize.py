"""rematerialize: compute activations again in backward instead of saving them (Chen et al. 2016).

What is computed again is pure: random numbers, collectives and values of anything with an effect are saved. It runs
before `zero`, which then gathers, for backward, the parameters that it reads there.
"""

import fnmatch
import functools
from dataclasses import dataclass

from torch import fx

from graphopt.cost.operations import contraction_flops
from graphopt.errors import PassError
from graphopt.ir import Level, Phase, Program, facts_of
from graphopt.nearest import nearest
from graphopt.passes.base import Pass, PassContext
from graphopt.passes.budget import Budget, Elsewhere, Repeatable, apply, choose
from graphopt.passes.build import Builder
from graphopt.passes.elsewhere import check_place
from graphopt.passes.repeat import repeat_in_backward
from graphopt.passes.repeatable import repeatable
from graphopt.sizes import readable_size

POLICIES = ("full", "selective", "budget")


@dataclass(frozen=True)
class RematerializeOptions:
    """policy: ``full`` keeps the inputs of each repeated layer; ``selective`` also matrix products and attention;
        ``budget`` what lets the step fit into bytes, at the least cost in time.
    bytes: what the step may hold at its peak. share: of what it saves, 1 for all of that. A budget has one of them.
    place, least_bytes: ``host`` or ``disk`` if a budget may also be kept by having values of at least that size wait
        there until backward.
    keep, keep_ops: patterns of module paths and of operators (as in fnmatch), joined by ``|``, whose values are saved
        in any case.
    """

    policy: str = "full"
    bytes: int | None = None
    share: float | None = None
    place: str = ""
    least_bytes: int = 1 << 20
    keep: str = ""
    keep_ops: str = ""

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise PassError(f"rematerialize: there is no policy {self.policy!r}; {nearest(self.policy, POLICIES)}")
        limits = [limit for limit in (self.bytes, self.share) if limit is not None]
        if len(limits) != (self.policy == "budget"):
            raise PassError("rematerialize: bytes or share, one of them, goes with policy=budget and with no other")
        if self.place:
            check_place("rematerialize", self.place)
        if self.place and self.policy != "budget":
            raise PassError(f"rematerialize: a place goes with policy=budget; use offload{{place={self.place}}}")


class Rematerialize(Pass):
    """Drop what forward saves, and compute it again where backward needs it."""

    name = "rematerialize"
    Options = RematerializeOptions
    level = Level.STEP
    produces = Level.STEP
    requires = frozenset({"differentiate"})
    conflicts = frozenset({"rematerialize", "offload", "zero", "offload_state"})
    keeps_values = True

    def run(self, program: Program, context: PassContext) -> bool:
        if not program.compute_nodes(Phase.BACKWARD):
            return False
        options = self.options
        builder = Builder(program, context, self.name)
        nodes = repeatable(program, lambda node: facts_of(node).layer, self._is_kept)
        if options.policy == "budget":
            anywhere = functools.partial(repeatable, program, lambda node: None, self._is_kept)
            return self._within_budget(builder, Repeatable(nodes, anywhere))
        if all(facts_of(node).layer is None for node in program.compute_nodes(Phase.FORWARD)):
            raise PassError("rematerialize: the model has no repeated layers, so there is nothing to compute again")
        nodes = {node for node in nodes if facts_of(node).layer is not None}
        reason = f"policy={options.policy} computes it again for backward, so that it is not saved"
        repeated = repeat_in_backward(builder, nodes, reason)
        context.statistics.update(repeated=repeated)
        return repeated > 0

    def _within_budget(self, builder: Builder, nodes: Repeatable) -> bool:
        options, context = self.options, builder.context
        elsewhere = Elsewhere(options.place, options.least_bytes) if options.place else None
        found = choose(builder.program, context, nodes, Budget(options.bytes, options.share), elsewhere)
        context.statistics.update(limit_bytes=found.limit, peak_bytes=found.peak_bytes)
        why = f"a step within {readable_size(found.limit)} has no room to save it"
        reasons = (f"{why}: it is computed again", f"{why}: it waits for backward on {options.place}")
        repeated, moved = apply(builder, found.choice, options.place, reasons)
        context.statistics.update(repeated=repeated, moved=moved)
        return repeated + moved > 0

    def _is_kept(self, node: fx.Node) -> bool:
        if self.options.policy == "selective" and contraction_flops(node) is not None:
            return True
        return _matches(facts_of(node).module, self.options.keep) or _matches(str(node.target), self.options.keep_ops)


def _matches(name: str, patterns: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns.split("|") if pattern)
