"""synchronize_batch_norm: statistics over the whole batch, on all ranks, instead of over each rank's part."""

import operator

import torch
from torch import fx

from graphopt.ir import Level, Phase, Program
from graphopt.ir.moves import ENTER, LEAVE
from graphopt.passes.base import Pass, PassContext, Tier
from graphopt.passes.build import Builder
from graphopt.passes.rewrite import remove_dead

aten = torch.ops.aten
_BATCH_NORM = aten._native_batch_norm_legit_functional.default


class SynchronizeBatchNorm(Pass):
    """Replace batch normalization in training mode by its definition with sums over the data-parallel ranks.

    Mean and variance are taken in two passes over the input, as eager does (Ioffe and Szegedy 2015, algorithm 1), in
    float32 at least; ranks may hold parts of different sizes.
    """

    name = "synchronize_batch_norm"
    level = Level.FORWARD
    produces = Level.FORWARD
    requires = frozenset({"canonicalize"})  # before it, what the ranks compute may have no derivative to compare
    tier = Tier.WHOLE_BATCH

    def run(self, program: Program, context: PassContext) -> bool:
        axis = context.data_axis
        nodes = [
            node
            for node in program.graph.find_nodes(op="call_function", target=_BATCH_NORM)
            if node.args[5] and context.mesh[axis] > 1
        ]
        for node in nodes:
            _replace(Builder(program, context, self.name), node, axis)
        remove_dead(program)
        context.statistics.update(synchronized=len(nodes))
        return bool(nodes)


def _replace(builder: Builder, node: fx.Node, axis: str) -> None:
    value, weight, bias, running_mean, running_var, _, momentum, eps = node.args
    assert isinstance(value, fx.Node) and isinstance(momentum, float)
    shape = value.meta["val"].shape
    channels, others = shape[1], [d for d in range(len(shape)) if d != 1]
    broadcast = [1, channels] + [1] * (len(shape) - 2)

    def call(target: object, *args: object, **kwargs: object) -> fx.Node:
        return builder.call(target, *args, like=node, phase=Phase.FORWARD, **kwargs)  # type: ignore[arg-type]

    def cast(given: fx.Node, dtype: torch.dtype) -> fx.Node:
        return given if given.meta["val"].dtype == dtype else call(aten._to_copy.default, given, dtype=dtype)

    def spread(per_channel: object) -> fx.Node:
        return call(aten.reshape.default, per_channel, broadcast)

    def moved(running: object, per_channel: fx.Node) -> fx.Node:
        assert isinstance(running, fx.Node)
        found = call(aten.detach.default, cast(per_channel, running.meta["val"].dtype))
        return call(aten.lerp.Scalar, running, found, momentum)

    def summed(value: fx.Node) -> fx.Node:
        """Over the ranks; the loss of each depends on what all have, so gradients are summed too."""
        return call(ENTER, call(LEAVE, value, axis), axis)

    wide = torch.promote_types(value.meta["val"].dtype, torch.float32)
    with builder.before(node):
        value = cast(value, wide)
        total = call(aten.sum.dim_IntList, value, others)
        count = call(aten.sum.default, call(aten.ones_like.default, call(aten.select.int, value, 1, 0)))
        packed = summed(call(aten.cat.default, [total, call(aten.reshape.default, count, [1])]))
        elements = call(aten.slice.Tensor, packed, 0, channels, channels + 1)
        mean = call(aten.div.Tensor, call(aten.slice.Tensor, packed, 0, 0, channels), elements)
        centered = call(aten.sub.Tensor, value, spread(mean))
        squares = summed(call(aten.sum.dim_IntList, call(aten.mul.Tensor, centered, centered), others))
        variance = call(aten.div.Tensor, squares, elements)
        scale = call(aten.rsqrt.default, call(aten.add.Scalar, variance, eps))
        result = call(aten.mul.Tensor, centered, spread(scale))
        if weight is not None:
            result = call(aten.mul.Tensor, result, spread(weight))
        if bias is not None:
            result = call(aten.add.Tensor, result, spread(bias))
        unbiased = call(aten.div.Tensor, squares, call(aten.sub.Scalar, elements, 1))
        results = {
            0: result,
            1: mean,
            2: scale,
            3: moved(running_mean, mean),
            4: moved(running_var, unbiased),
        }
        results = {i: cast(result, node.meta["val"][i].dtype) for i, result in results.items()}
    for item in list(node.users):
        assert item.target is operator.getitem
        item.replace_all_uses_with(results[item.args[1]])  # type: ignore[index]
        builder.graph.erase_node(item)
    builder.graph.erase_node(node)
