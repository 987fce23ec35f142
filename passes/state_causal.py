"""state_causal: attention says that it is causal, where its mask says so element by element."""

from graphopt._torch import argument
from graphopt.ir import Level, Program
from graphopt.passes.base import Pass, PassContext
from graphopt.passes.causal_masks import ATTENTION, causal_calls, state_causal
from graphopt.passes.rewrite import remove_dead


class StateCausal(Pass):
    """Has attention under a causal mask that depends on no input be called with `is_causal` and without the mask.

    Models of Transformers leave such a mask out when they run eagerly, and make it when they are traced. Without it
    torch has its fast kernels, which skip what is masked, and nothing as large as the square of the sequence is kept.
    """

    name = "state_causal"
    level = Level.FORWARD
    produces = Level.FORWARD
    requires = frozenset({"canonicalize"})

    def run(self, program: Program, context: PassContext) -> bool:
        calls = [
            node
            for node in causal_calls(program)
            if argument(ATTENTION, "attn_mask", node.args, node.kwargs) is not None
        ]
        for node in calls:
            state_causal(node)
        if calls:
            remove_dead(program)
        context.statistics.update(calls=len(calls))
        return bool(calls)
