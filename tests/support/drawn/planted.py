"""A registry with a fault in it: the derivative of tanh is three times too large."""

from collections.abc import Mapping

import torch

from graphopt.ir import Program
from graphopt.passes import REGISTRY as SOUND
from graphopt.passes.base import Pass, PassContext
from graphopt.passes.differentiate import Differentiate

aten = torch.ops.aten


class Faulty(Differentiate):
    """Differentiates, and multiplies what comes from a tanh."""

    def run(self, program: Program, context: PassContext) -> bool:
        changed = super().run(program, context)
        for node in program.graph.find_nodes(op="call_function", target=aten.tanh_backward.default):
            with program.graph.inserting_after(node):
                thrice = program.graph.call_function(aten.mul.Tensor, (node, 3))
            thrice.meta = dict(node.meta)
            node.replace_all_uses_with(thrice, delete_user_cb=lambda user, made=thrice: user is not made)
        return changed


REGISTRY: Mapping[str, type[Pass]] = {**SOUND, "differentiate": Faulty}
