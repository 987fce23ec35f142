"""precision: casts between the stored parameters and the dtype in which the model was captured."""

import torch
from torch import fx

from graphopt.ir import InputKind, Level, OutputKind, Phase, Program, explain
from graphopt.ir.collectives import summand_of, waits_of
from graphopt.passes.base import Pass, PassContext, Tier
from graphopt.passes.build import Builder

_to_copy = torch.ops.aten._to_copy.default


class Precision(Pass):
    """Cast each parameter from its stored dtype where the program computes in another, and its gradient back.

    The model is captured in the compute dtype, so the casts its author wrote are in the graph; this pass adds only
    those at the border, where `zero` moves them before the gather.
    """

    name = "precision"
    level = Level.STEP
    produces = Level.STEP
    requires = frozenset({"differentiate"})
    conflicts = frozenset({"zero", "offload_state"})
    tier = Tier.REASSOCIATES

    def run(self, program: Program, context: PassContext) -> bool:
        builder = Builder(program, context, self.name)
        casts = 0
        for role, node in list(program.nodes_of(InputKind.PARAMETER)):
            stored = context.layouts[role.name].dtype
            if node.meta["val"].dtype != stored:
                _cast_parameter(builder, node, stored)
                casts += 1
        results = list(program.results)
        for index, (output, gradient) in enumerate(zip(program.outputs, results, strict=True)):
            if output.kind is OutputKind.GRADIENT and gradient is not None:
                results[index] = _cast_gradient(builder, gradient, output.name)
        program.set_results(results, program.outputs)
        context.statistics.update(casts=casts)
        return casts > 0


def _cast_parameter(builder: Builder, node: fx.Node, stored: torch.dtype) -> None:
    computed = node.meta["val"].dtype
    users = list(node.users)
    with builder.context.fake_mode:
        node.meta["val"] = torch.empty_like(node.meta["val"], dtype=stored)
    if not users:
        return
    first = min(users)
    with builder.before(first):
        cast = builder.call(_to_copy, node, dtype=computed, like=first, phase=Phase.FORWARD)
    explain(cast, builder.made_by, f"the model computes in {computed}, its parameter is stored in {stored}")
    for user in users:
        user.replace_input_with(node, cast)


def _cast_gradient(builder: Builder, gradient: fx.Node, name: str) -> fx.Node:
    """To the dtype in which sums over ranks are taken, before all of them, and to the stored dtype behind them.

    The cast behind the mean over the data-parallel ranks is for `zero` to make.
    """
    layout, reduced = builder.context.layouts[name], builder.context.reduce_dtype
    summand, sums = summand_of(gradient)
    is_reduced = layout.ranks > 1 or bool(sums)
    cast = _cast(builder, summand, reduced if reduced is not None and is_reduced else layout.dtype)
    if not sums:
        gradient = cast
    elif cast is not summand:
        sums[-1].replace_input_with(summand, cast)
        for launched in reversed(sums):
            for node in (launched, *waits_of(launched)):
                builder.revalue(node)
    return gradient if layout.ranks > 1 else _cast(builder, gradient, layout.dtype)


def _cast(builder: Builder, gradient: fx.Node, dtype: torch.dtype) -> fx.Node:
    if gradient.meta["val"].dtype == dtype:
        return gradient
    with builder.after(gradient):
        return builder.call(_to_copy, gradient, dtype=dtype, like=gradient, phase=Phase.BACKWARD)
