"""Heads of keys and values that a program repeats for groups of queries, where attention can group them itself."""

from typing import Any

import torch
from torch import fx

aten = torch.ops.aten
_SAME_ELEMENTS = frozenset(
    {aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.clone.default}
)  # in the same order


def state_grouped(node: fx.Node) -> None:
    """Have an attention call take keys and values before they are repeated: there is less of them to move."""
    query, *repeated = node.args
    few = [_unrepeated(each) for each in repeated]
    heads = {each.meta["val"].shape[1] for each in few if each is not None}
    if None not in few and len(heads) == 1:
        node.args = (query, *few)
        node.kwargs = node.kwargs | {"enable_gqa": True}


def _unrepeated(node: Any) -> fx.Node | None:
    """[b, g, s, d], of which [b, g * r, s, d] is ``x[:, :, None].expand(b, g, r, s, d)`` reshaped; else None."""
    whole = node.meta["val"].shape
    while node.target in _SAME_ELEMENTS:
        node = node.args[0]
    if node.target is not aten.expand.default or node.args[0].target is not aten.unsqueeze.default:
        return None
    source, dim = node.args[0].args
    few: fx.Node = source
    repeated, shape = node.meta["val"].shape, few.meta["val"].shape
    if len(shape) != 4 or dim not in (2, -3) or len(repeated) != 5:
        return None
    batch, heads, rows, width = shape
    is_merged = tuple(whole) == (batch, heads * repeated[2], rows, width)
    return few if is_merged and tuple(repeated) == (batch, heads, repeated[2], rows, width) else None
