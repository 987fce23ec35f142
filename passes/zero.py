"""zero: shard parameters, gradients and optimizer state over the data-parallel ranks (Rajbhandari et al. 2020).

The three stages are one rewrite with two answers: where a gathered parameter is dropped, and when gradients are
reduced.

    stage   gathered parameter               gradients reduced
    0       never sharded                    as each is complete (all-reduce)
    1       resident, outlasts the step      when backward is done
    2       resident, outlasts the step      as each is complete
    3       after its last use in forward,   as each is complete
            gathered again for backward

A gradient that is a sum over model axes as well is summed over the data-parallel ranks first, so that of a sharded
parameter only shards travel over the others; in every stage, so that they agree in every bit.
"""

import fnmatch
import operator
from dataclasses import dataclass

import torch
from torch import fx

from graphopt.errors import PassError
from graphopt.ir import (
    Input,
    InputKind,
    Level,
    OutputKind,
    ParameterLayout,
    Phase,
    Program,
    annotate,
    explain,
    facts_of,
)
from graphopt.ir.collectives import summand_of, waits_of
from graphopt.passes.base import Pass, PassContext, Tier
from graphopt.passes.build import Builder
from graphopt.passes.repeat import made_of, repeat_in_backward

aten = torch.ops.aten
collective = torch.ops._c10d_functional


@dataclass(frozen=True)
class ZeroOptions:
    """stage: 0 to 3. keep: name patterns, joined by ``|``, of what stays gathered until backward in stage 3."""

    stage: int = 3
    keep: str = ""

    def __post_init__(self) -> None:
        if self.stage not in (0, 1, 2, 3):
            raise PassError(f"zero: stage={self.stage} is out of range; the nearest is {min(max(self.stage, 0), 3)}")


class Zero(Pass):
    """Gather sharded parameters where they are used; reduce gradients to shards."""

    name = "zero"
    Options = ZeroOptions
    level = Level.STEP
    produces = Level.STEP
    requires = frozenset({"differentiate"})
    conflicts = frozenset({"zero", "bucket", "schedule", "offload_state", "overlap"})
    tier = Tier.REASSOCIATES
    keeps_values = True

    def run(self, program: Program, context: PassContext) -> bool:
        builder = Builder(program, context, self.name)
        sharded = [
            (role, node, context.layouts[role.name])
            for role, node in program.nodes_of(InputKind.PARAMETER)
            if not context.layouts[role.name].is_whole
        ]
        weights = {_weight(node): layout for _, node, layout in sharded}
        dropped = [w for w, layout in weights.items() if self._dropped_after_forward(layout)]
        rederived = _rederive_in_backward(builder, dropped)
        for role, node, layout in sharded:
            self._gather(builder, role, node, layout)
        reduced = self._reduce_gradients(builder) if context.reduce_gradients else 0
        program.reduced = context.reduce_gradients
        context.statistics.update(sharded=len(sharded), reduced=reduced, rederived=rederived)
        return bool(sharded or reduced)

    def _dropped_after_forward(self, layout: ParameterLayout) -> bool:
        kept = any(fnmatch.fnmatchcase(layout.name, pattern) for pattern in self.options.keep.split("|"))
        return self.options.stage == 3 and not kept

    def _gather(self, builder: Builder, role: Input, parameter: fx.Node, layout: ParameterLayout) -> None:
        """Replace the whole parameter by its shard, gathered before the first use (in each direction, if dropped)."""
        program = builder.program
        weight = _weight(parameter)
        dtype = weight.meta["val"].dtype
        shard = program.add_input(
            Input(InputKind.SHARD, role.name, role.requires_grad),
            builder.fake(layout.shard_shape, layout.dtype, parameter),
            after=parameter,
        )
        users = sorted(weight.users)
        phases = [users]
        if self._dropped_after_forward(layout):
            phases = [[u for u in users if facts_of(u).phase is phase] for phase in Phase]
        for group in phases:
            if group:
                whole = self._gather_before(builder, group[0], shard, layout, dtype)
                for user in group:
                    user.replace_input_with(weight, whole)
        if weight is not parameter:
            program.graph.erase_node(weight)
        program.remove_input(parameter)

    def _gather_before(
        self, builder: Builder, user: fx.Node, shard: fx.Node, layout: ParameterLayout, dtype: torch.dtype
    ) -> fx.Node:
        """The whole parameter in `dtype`, ready before `user`. The cast comes before the gather: fewer bytes move."""
        phase = facts_of(user).phase

        def call(target: object, *args: object, **kwargs: object) -> fx.Node:
            return builder.call(target, *args, like=user, phase=phase, **kwargs)  # type: ignore[arg-type]

        with builder.before(user):
            source = shard if dtype == layout.dtype else call(aten._to_copy.default, shard, dtype=dtype)
            gather = call(collective.all_gather_into_tensor_coalesced.default, [source], layout.ranks, layout.axis)
            item = call(operator.getitem, gather, 0)
            whole = call(collective.wait_tensor.default, item)
            resident = self.options.stage < 3
            kept = not resident and not self._dropped_after_forward(layout)
            for node in (gather, item, whole):
                annotate(node, resident=resident, kept=kept)
                explain(node, self.name, self._lifetime(layout, phase))
            if layout.is_padded:
                whole = call(aten.slice.Tensor, whole, 0, 0, layout.rows)
            if tuple(whole.meta["val"].shape) != layout.shape:
                whole = call(aten.view.default, whole, list(layout.shape))
        return whole

    def _lifetime(self, layout: ParameterLayout, phase: Phase) -> str:
        """How long a gathered parameter stays, for the reader."""
        stage, name = self.options.stage, layout.name
        if stage < 3:
            return f"stage {stage} keeps {name} gathered over steps, and gathers it again when a shard has changed"
        if not self._dropped_after_forward(layout):
            return f"keep={self.options.keep} holds {name} from forward to backward, so it is gathered once"
        return f"stage 3 gathers {name} for {phase.value} alone, and drops it after its last use there"

    def _reduce_gradients(self, builder: Builder) -> int:
        """Sum each parameter's gradient over the ranks and take the mean; shards of those that are sharded."""
        program = builder.program
        results = list(program.results)
        replaced: list[fx.Node] = []
        count = 0
        for index, (role, gradient) in enumerate(program.results_of(*OutputKind)):
            layout = builder.context.layouts.get(role.name) if role.kind is OutputKind.GRADIENT else None
            if layout is None or gradient is None or layout.ranks == 1:
                continue
            last = self.options.stage == 1
            moment = "when backward is done" if last else "once complete"
            summand, sums = summand_of(gradient)
            with builder.before(program.output_node) if last else builder.after(gradient):
                results[index] = _reduced(builder, summand, layout, sums, moment)
            replaced += [node for launched in sums for node in (*waits_of(launched), launched)]
            count += 1
        program.set_results(results, program.outputs)
        for node in replaced:
            program.graph.erase_node(node)
        return count


def _weight(parameter: fx.Node) -> fx.Node:
    """The parameter as the program computes with it: behind the cast that `precision` made, if there is one."""
    users = list(parameter.users)
    if len(users) == 1 and facts_of(users[0]).made_by == "precision":
        return users[0]
    return parameter


def _reduced(builder: Builder, gradient: fx.Node, layout: ParameterLayout, sums: list[fx.Node], moment: str) -> fx.Node:
    """The mean over ranks of `gradient`, whole or this rank's padded rows, in the dtype of the stored parameter.

    sums: over other axes, which are still to be taken; the last first.
    """

    def call(target: object, *args: object, **kwargs: object) -> fx.Node:
        return builder.call(target, *args, like=gradient, phase=Phase.BACKWARD, **kwargs)  # type: ignore[arg-type]

    if layout.is_whole:
        started = call(collective.all_reduce_coalesced.default, [gradient], "sum", layout.axis)
    else:
        value = gradient
        rows = (layout.rows, *layout.row_shape)
        if tuple(value.meta["val"].shape) != rows:
            value = call(aten.reshape.default, value, list(rows))
        if layout.is_padded:
            missing = layout.gathered_shape[0] - layout.rows
            value = call(aten.constant_pad_nd.default, value, [0, 0] * len(layout.row_shape) + [0, missing])
        started = call(collective.reduce_scatter_tensor_coalesced.default, [value], "sum", layout.ranks, layout.axis)
    explain(started, builder.made_by, f"the gradient of {layout.name} is summed over {layout.axis} {moment}")
    total = call(collective.wait_tensor.default, call(operator.getitem, started, 0))
    for axis in (launched.args[-1] for launched in reversed(sums)):
        started = call(collective.all_reduce_coalesced.default, [total], "sum", axis)
        explain(started, builder.made_by, f"what a rank keeps of the gradient of {layout.name} is summed over {axis}")
        total = call(collective.wait_tensor.default, call(operator.getitem, started, 0))
    mean = call(aten.div.Tensor, total, layout.ranks)
    if mean.meta["val"].dtype != layout.dtype:
        mean = call(aten._to_copy.default, mean, dtype=layout.dtype)
    return mean


def _rederive_in_backward(builder: Builder, weights: list[fx.Node]) -> int:
    """Repeat in backward what forward made of the weights alone (a transpose, a cast), so that none of it is saved."""
    made = made_of(builder.program, weights)
    return repeat_in_backward(builder, made, "made of weights alone, so it is made again and not saved")
