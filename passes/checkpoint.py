"""checkpoint: compute again in backward what the model's author put under `torch.utils.checkpoint`.

Random numbers are saved, as everywhere, so that the results are eager's. It runs before `rematerialize`, which may have
more computed again, and before `zero`, which gathers what that reads.
"""

from torch import fx

from graphopt.ir import Level, Program, facts_of
from graphopt.passes.base import Pass, PassContext
from graphopt.passes.build import Builder
from graphopt.passes.repeat import repeat_in_backward
from graphopt.passes.repeatable import repeatable


class Checkpoint(Pass):
    """Of each region save what it reads, what it gives, and what its own policy says."""

    name = "checkpoint"
    level = Level.STEP
    produces = Level.STEP
    requires = frozenset({"differentiate"})
    conflicts = frozenset({"checkpoint", "rematerialize", "offload", "zero", "offload_state"})
    keeps_values = True

    def run(self, program: Program, context: PassContext) -> bool:
        nodes = repeatable(program, lambda node: facts_of(node).checkpoint, _is_kept)
        reason = "a region of torch.utils.checkpoint computes it again for backward, so that it is not saved"
        repeated = repeat_in_backward(Builder(program, context, self.name), nodes, reason)
        context.statistics.update(regions=len({facts_of(node).checkpoint for node in nodes}), repeated=repeated)
        return repeated > 0


def _is_kept(node: fx.Node) -> bool:
    facts = facts_of(node)
    return facts.checkpoint is None or str(node.target) in facts.checkpoint_saves
