"""Masks of attention that are causal, though a program makes them by comparing positions, as Transformers' models do.

What depends on no input is computed here, but for what compares each query with each key: that is read off the two
vectors that it compares, in time and memory proportional to the sequence.
"""

import enum
from collections.abc import Iterator
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
_UP_TO = {aten.le: torch.le, aten.lt: torch.lt}  # keys on the left
_FROM = {aten.ge: torch.le, aten.gt: torch.lt}  # keys on the right


def causal_calls(program: Program) -> Iterator[fx.Node]:
    """The attention calls under a causal mask that is stated (`is_causal`), or made of no input."""
    masks = _Masks()
    for node in program.compute_nodes():
        if node.target is ATTENTION:
            mask = argument(ATTENTION, "attn_mask", node.args, node.kwargs)
            stated = argument(ATTENTION, "is_causal", node.args, node.kwargs)
            if stated or (isinstance(mask, fx.Node) and masks.pairs_of(mask) is Pairs.CAUSAL):
                yield node


def state_causal(node: fx.Node) -> None:
    """Have a call say that its mask is causal, rather than be given one."""
    assert isinstance(node.target, OpOverload)
    given = dict(zip(declared_arguments(node.target), node.args, strict=False)) | node.kwargs
    node.args = tuple(given.pop(name) for name in ("query", "key", "value"))
    node.kwargs = given | {"attn_mask": None, "is_causal": True}


class _Masks:
    """What is known of values that depend on no input."""

    def __init__(self) -> None:
        self._known: dict[fx.Node, _Known] = {}

    def pairs_of(self, mask: fx.Node) -> Pairs | None:
        return _pairs(self._of(mask))

    def _of(self, node: fx.Node) -> _Known:
        if node not in self._known:
            self._known[node] = self._read(node)
        return self._known[node]

    def _read(self, node: fx.Node) -> _Known:
        value = node.meta.get("val")
        is_fixed = isinstance(value, torch.Tensor) and all(type(size) is int for size in value.shape)
        if not is_fixed or not isinstance(node.target, OpOverload) or effect_of(node) is not Effect.PURE:
            return None
        packet = node.target.overloadpacket
        of_shape = packet in _OF_SHAPE
        known = {source: _shaped(source) if of_shape else self._of(source) for source in node.all_input_nodes}
        if any(each is None for each in known.values()):
            return None
        if any(isinstance(each, Pairs) for each in known.values()):
            return _of_pairs(node, known)
        sizes = [each.numel() for each in known.values() if isinstance(each, torch.Tensor)]
        if len(sizes) == 2 and value.numel() > max(sizes):
            return _compared(packet, *(known[source] for source in node.all_input_nodes))
        if packet is not aten.expand and value.numel() > _MOST_ELEMENTS:
            return None
        args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
        made: torch.Tensor = node.target(*args, **kwargs | ({"device": "cpu"} if "device" in kwargs else {}))
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


def _of_pairs(node: fx.Node, known: dict[fx.Node, _Known]) -> Pairs | None:
    """Of a call that is given pairs: both of two masks, or the same mask in another shape."""
    assert isinstance(node.target, OpOverload)
    packet = node.target.overloadpacket
    found = [_pairs(each) for each in known.values()]
    if packet in _SAME and node.meta["val"].shape[-2:] == node.all_input_nodes[0].meta["val"].shape[-2:]:
        return found[0]
    if packet in _BOTH and None not in found:
        return Pairs.CAUSAL if Pairs.CAUSAL in found else Pairs.ALL
    return None


def _compared(packet: Any, *operands: Any) -> Pairs | None:
    """What a comparison says of the positions of queries [..., s, 1] and keys [..., 1, s]."""
    left, right = operands
    if min(left.dim(), right.dim()) < 2:
        return None
    swapped = left.shape[-2] == 1
    keys, queries = (left, right) if swapped else (right, left)
    rows, columns = queries.shape[-2:], keys.shape[-2:]
    if rows[1] != 1 or columns[0] != 1 or rows[0] != columns[1]:
        return None
    keys, queries = keys.squeeze(-2), queries.squeeze(-1)
    if packet is aten.eq:
        everything = torch.cat(torch.broadcast_tensors(keys, queries), -1)
        return Pairs.ALL if bool((everything == everything[..., :1]).all()) else None
    sees = (_UP_TO if swapped else _FROM).get(packet)
    if sees is None:
        return None
    if bool(sees(keys.amax(-1), queries.amin(-1)).all()):
        return Pairs.ALL
    is_sorted = bool((keys.diff() >= 0).all())
    to_own, no_further = sees(keys, queries).all(), ~sees(keys[..., 1:], queries[..., :-1]).any()
    return Pairs.CAUSAL if is_sorted and bool(to_own) and bool(no_further) else None
