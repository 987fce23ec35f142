"""Which integers a program can be given: those that it uses as indices must lie within what they index."""

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import fx

from graphopt.ir import Program
from graphopt.ir.values import in_example

aten = torch.ops.aten

_MOVES = frozenset(
    {
        aten.alias.default,
        aten.cat.default,
        aten.clone.default,
        aten.constant_pad_nd.default,
        aten.copy.default,
        aten.detach.default,
        aten.expand.default,
        aten.masked_fill.Scalar,
        aten.permute.default,
        aten.reshape.default,
        aten.select.int,
        aten.select_scatter.default,
        aten.slice.Tensor,
        aten.slice_scatter.default,
        aten.squeeze.dim,
        aten.t.default,
        aten.transpose.int,
        aten.unsqueeze.default,
        aten.view.default,
        aten.where.self,
        aten._to_copy.default,
        aten._unsafe_view.default,
    }
)


def index_bound(program: Program, node: fx.Node) -> int | None:
    """The length of the shortest dimension that elements of `node` index, moved around but not computed with.

    None if they index nothing. Symbolic sizes count as in the example.
    """
    seen: set[fx.Node] = set()
    todo, bounds = [node], list[int]()
    while todo:
        value = todo.pop()
        seen.add(value)
        for user in value.users:
            bounds.extend(_indexed(user, value))
            if user.target in _MOVES and user not in seen:
                todo.append(user)
    return min(bounds, default=None)


def _indexed(user: fx.Node, index: fx.Node) -> Iterator[int]:
    """Lengths of the dimensions of its first argument that `user` looks `index` up in."""
    if user.op != "call_function" or not isinstance(user.args[0], fx.Node):
        return
    table = user.args[0].meta["val"]
    if user.target is aten.embedding.default and user.args[1] is index:
        yield in_example(table.shape[0])
    elif user.target in (aten.nll_loss_forward.default, aten.nll_loss2d_forward.default) and user.args[1] is index:
        yield in_example(table.shape[-1 if table.dim() == 1 else 1])
    elif user.target in (aten.gather.default, aten.index_select.default) and user.args[2] is index:
        yield in_example(table.shape[user.args[1]])
    elif user.target is aten.index.Tensor:
        indices = cast("Sequence[fx.Node | None]", user.args[1])
        positions = [position for position, each in enumerate(indices) if each is index]
        yield from (in_example(table.shape[position]) for position in positions)
