"""Masks of attention that are causal, though a program makes them by comparing positions, as Transformers' models do.

What depends on no input is computed here, but for what compares each query with each key: that is read off the two
vectors that it compares, in time and memory proportional to the sequence.
"""

import enum
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from graphopt._torch import OpOverload, argument, declared_arguments
from graphopt.ir import Effect, Program, effect_of

aten = torch.ops.aten
ATTENTION = aten.scaled_dot_product_attention.default


class Pairs(enum.Enum):
    """Which queries see which keys, of as many."""

    ALL = "all"
    CAUSAL = "causal"  # each query those up to its own place


_Known = torch.Tensor | Pairs | None  # None: not known

_MOST_ELEMENTS = 1 << 24  # of a tensor that is computed
_OF_SHAPE = frozenset({aten.new_ones, aten.new_zeros, aten.new_full, aten.ones_like, aten.zeros_like, aten.full_like})
_BOTH = frozenset({aten.__and__, aten.bitwise_and, aten.logical_and})
_SAME = frozenset({aten.expand, aten.unsqueeze, aten.clone, aten.alias, aten.view, aten.reshape, aten.contiguous})
_KEYS_FIRST = {aten.le: torch.le, aten.lt: torch.lt, aten.ge: torch.ge, aten.gt: torch.gt}
_QUERIES_FIRST = {aten.le: torch.ge, aten.lt: torch.gt, aten.ge: torch.le, aten.gt: torch.lt}


def causal_calls(program: Program) -> list[fx.Node]:
    """The attention calls under a causal mask that is stated (`is_causal`), or made of no input."""
    calls = [node for node in program.compute_nodes() if node.target is ATTENTION]
    masks = {node: argument(ATTENTION, "attn_mask", node.args, node.kwargs) for node in calls}
    known = _known_of(program, {mask for mask in masks.values() if isinstance(mask, fx.Node)})
    stated = {node for node in calls if argument(ATTENTION, "is_causal", node.args, node.kwargs)}
    return [node for node in calls if node in stated or _pairs(known.get(masks[node])) is Pairs.CAUSAL]


def state_causal(node: fx.Node) -> None:
    """Have a call say that its mask is causal, rather than be given one."""
    assert isinstance(node.target, OpOverload)
    given = dict(zip(declared_arguments(node.target), node.args, strict=False)) | node.kwargs
    node.args = tuple(given.pop(name) for name in ("query", "key", "value"))
    node.kwargs = given | {"attn_mask": None, "is_causal": True}


def _known_of(program: Program, masks: set[fx.Node]) -> dict[object, _Known]:
    """What is known of masks, and of what they are made of."""
    behind, todo = set(masks), list(masks)
    while todo:
        fresh = set(todo.pop().all_input_nodes) - behind
        behind |= fresh
        todo += fresh
    known: dict[object, _Known] = {}
    for node in program.compute_nodes():
        if node in behind:
            known[node] = _read(node, known)
    return known


def _read(node: fx.Node, known: Mapping[object, _Known]) -> _Known:
    value = node.meta["val"]
    if not isinstance(value, torch.Tensor) or not all(type(size) is int for size in value.shape):
        return None
    if not isinstance(node.target, OpOverload) or effect_of(node) is not Effect.PURE:
        return None
    packet = node.target.overloadpacket
    given: dict[fx.Node, Any] = {
        each: _shaped(each) if packet in _OF_SHAPE else known.get(each) for each in node.all_input_nodes
    }
    tensors = [each for each in given.values() if isinstance(each, torch.Tensor)]
    if len(tensors) < len(given):
        return _of_pairs(node, list(given.values()))
    if len(tensors) == 2 and value.numel() > max(tensor.numel() for tensor in tensors):
        return _compared(packet, *tensors)
    if packet is not aten.expand and value.numel() > _MOST_ELEMENTS:
        return None
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: given[source])
    made: _Known = node.target(*args, **kwargs | ({"device": "cpu"} if "device" in kwargs else {}))
    return made


def _shaped(node: fx.Node) -> torch.Tensor | None:
    """A tensor like a value of which nothing but shape and dtype is known."""
    value = node.meta["val"]
    is_fixed = all(type(size) is int for size in value.shape)
    return torch.zeros((), dtype=value.dtype).expand(value.shape) if is_fixed else None


def _pairs(known: _Known) -> Pairs | None:
    """What a mask says. A tensor is looked through."""
    if not isinstance(known, torch.Tensor):
        return known
    if known.dtype != torch.bool:
        return None
    if known.all():
        return Pairs.ALL
    is_square = known.dim() > 1 and known.shape[-1] == known.shape[-2]
    return Pairs.CAUSAL if is_square and torch.equal(known, torch.ones_like(known).tril()) else None


def _of_pairs(node: fx.Node, given: list[_Known]) -> Pairs | None:
    """Of a call that is given pairs: both of two masks, or the same mask in another shape."""
    assert isinstance(node.target, OpOverload)
    packet = node.target.overloadpacket
    found = [_pairs(each) for each in given]
    if packet in _SAME and node.meta["val"].shape[-2:] == node.all_input_nodes[0].meta["val"].shape[-2:]:
        return found[0]
    if packet in _BOTH and None not in found:
        return Pairs.CAUSAL if Pairs.CAUSAL in found else Pairs.ALL
    return None


def _compared(packet: Any, left: torch.Tensor, right: torch.Tensor) -> Pairs | None:
    """What a comparison says of the positions of queries [..., s, 1] and keys [..., 1, s]."""
    left, right = torch.atleast_2d(left, right)
    keys_first = left.shape[-2] == 1
    keys, queries = (left, right) if keys_first else (right, left)
    rows, columns = queries.shape[-2:], keys.shape[-2:]
    if rows[1] != 1 or columns[0] != 1 or rows[0] != columns[1]:
        return None
    keys, queries = keys.squeeze(-2), queries.squeeze(-1)
    if packet is aten.eq:
        everything = torch.cat(torch.broadcast_tensors(keys, queries), -1)
        return Pairs.ALL if bool((everything == everything[..., :1]).all()) else None
    sees = (_KEYS_FIRST if keys_first else _QUERIES_FIRST).get(packet)
    if sees is None:
        return None
    looks_back = sees in (torch.le, torch.lt)
    least = (keys.amax(-1), queries.amin(-1)) if looks_back else (keys.amin(-1), queries.amax(-1))
    if bool(sees(*least).all()):
        return Pairs.ALL
    is_sorted = bool((keys.diff() >= 0).all())
    to_own, no_further = sees(keys, queries).all(), ~sees(keys[..., 1:], queries[..., :-1]).any()
    return Pairs.CAUSAL if looks_back and is_sorted and bool(to_own) and bool(no_further) else None
