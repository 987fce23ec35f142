"""What ranks that exchange rows by group need to know of each other's."""

import torch
from torch import fx

from graphopt.ir import Phase
from graphopt.ir.moves import OWN_PART
from graphopt.passes.build import Builder

aten = torch.ops.aten


def dispatched_ends(builder: Builder, ends: fx.Node, chunk: int, ranks: int, axis: str, reader: fx.Node) -> fx.Node:
    """Where among the rows that are dispatched to a rank each of its groups ends, int [chunk].

    ends: int [ranks * groups], of each rank in turn, where each group ends among its rows.
    """

    def call(target: torch._ops.OpOverload, *args: object, **kwargs: object) -> fx.Node:
        return builder.call(target, *args, like=reader, phase=Phase.FORWARD, **kwargs)

    by_rank = call(aten.view.default, ends, [ranks, ends.meta["val"].shape[0] // ranks])
    before = call(aten.constant_pad_nd.default, call(aten.slice.Tensor, by_rank, 1, 0, -1), [1, 0], 0)
    counts = call(aten.sum.dim_IntList, call(aten.sub.Tensor, by_rank, before), [0])
    own = call(OWN_PART, counts, 0, 1, chunk, ranks, axis)
    return call(aten.cumsum.default, own, 0, dtype=ends.meta["val"].dtype)
