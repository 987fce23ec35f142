"""Operators that lay elements out anew: views, joins and cuts."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from graphopt.dimensions.factors import refined
from graphopt.dimensions.notation import Call, Labels, Rule, Shape, positions, same_size
from graphopt.dimensions.signature import Dimension, Dimensions, Signature

aten = torch.ops.aten
FIRST = (frozenset({0}),)


def reshape(call: Call) -> Signature | None:
    """Both shapes are products of the same factors, as far as these are known."""
    if call.target is aten.view.dtype:
        return None
    before, (after,) = call.operands[0], call.results
    labels, first, result = refined(before, after)
    operands = [first]
    if len(call.operands) == 2:  # view_as: the second has the shape of the result
        operands.append(result)
    return labels.signature(operands, [result], linear=FIRST)


def squeeze(call: Call) -> Signature | None:
    """As `reshape`; what it would drop if it were one, as a part may be, is whole."""
    found = reshape(call)
    if found is None:
        return None
    asked = call["dim"]
    rank = len(call.operands[0])
    dims = range(rank) if asked is None else [asked] if isinstance(asked, int) else asked
    return replace(found, whole=found.whole.union(*(found.operands[0][at] for at in dims if rank)))


def permute(call: Call) -> Signature | None:
    """Dimensions in another order."""
    (before,), (after,) = call.operands, call.results
    rank = len(before)
    order = _order(call, rank)
    labels = Labels()
    places = positions(rank)
    operand = tuple(labels.name(places[at], before[at]) for at in range(rank))
    result = tuple(labels.name(places[at], size) for at, size in zip(order, after, strict=True))
    return labels.signature([operand], [result], linear=FIRST)


def _order(call: Call, rank: int) -> list[int]:
    """For each dimension of the result, which of the operand's it is."""
    order = list(range(rank))
    if call["dims"] is not None:
        return [dim % rank for dim in call["dims"]]
    if call["source"] is not None:
        source, goal = _listed(call["source"], rank), _listed(call["destination"], rank)
        rest = iter([dim for dim in order if dim not in source])
        placed = dict(zip(goal, source, strict=True))
        return [placed[at] if at in placed else next(rest) for at in range(rank)]
    if rank < 2:
        return order
    pair = [call[name] for name in ("dim0", "dim1", "axis0", "axis1") if call[name] is not None] or [0, 1]
    one, other = (dim % rank for dim in pair)
    order[one], order[other] = order[other], order[one]
    return order


def _listed(dims: int | Sequence[int], rank: int) -> list[int]:
    return [dim % rank for dim in ([dims] if isinstance(dims, int) else dims)]


def expand(call: Call) -> Signature | None:
    """Repeats dimensions of size one, and adds dimensions before the first."""
    after = call.results[0]
    labels = Labels()
    result = tuple(map(labels.name, positions(len(after)), after))
    operand = _trailing(labels, call.operands[0], after)
    return labels.signature([operand, *[result] * (len(call.operands) - 1)], [result], linear=FIRST)


def broadcast_tensors(call: Call) -> Signature | None:
    """As `expand`, each of several."""
    after = call.results[0]
    labels = Labels()
    result = tuple(map(labels.name, positions(len(after)), after))
    operands = [_trailing(labels, shape, after) for shape in call.operands]
    return labels.signature(operands, [result] * len(call.results), linear=[frozenset(range(len(operands)))])


def _trailing(labels: Labels, operand: Shape, result: Shape) -> Dimensions:
    places = positions(len(result))[len(result) - len(operand) :]
    return tuple(map(labels.name, places, operand))


def select(call: Call) -> Signature | None:
    """One place of a dimension."""
    before = call.operands[0]
    at = call["dim"] % len(before)
    labels, operand = _but(before, at)
    return labels.signature([operand], [operand[:at] + operand[at + 1 :]], linear=FIRST)


def cut(call: Call) -> Signature | None:
    """Dimensions whose size changes cannot be split; the others are carried."""
    return _resized(call, set())


def difference(call: Call) -> Signature | None:
    """Differences of neighbours along a dimension."""
    return _resized(call, {call["dim"] % len(call.results[0])})


def pad(call: Call) -> Signature | None:
    """As `cut`, but linear only where nothing but zeros is put around."""
    after = call.results[0]
    sides = call["pad"] if call["pad"] is not None else call["padding"]
    changed = {len(after) - 1 - index // 2 for index, width in enumerate(sides) if width != 0}
    found = _resized(call, changed)
    zeros = call["mode"] not in (None, "constant") or call["value"] in (None, 0)
    return found if found is None or zeros else replace(found, linear=())


def _resized(call: Call, changed: set[int]) -> Signature | None:
    """The dimensions in `changed`, and all whose size changes, are apart in each operand and result."""
    labels = Labels()
    shapes = [*call.operands, *call.results]
    named: list[list[Dimension]] = [[] for _ in shapes]
    for at, place in enumerate(positions(len(shapes[-1]))):
        sizes = [shape[at] for shape in shapes]
        alike = at not in changed and all(same_size(size, sizes[-1]) for size in sizes)
        for dimensions, size in zip(named, sizes, strict=True):
            dimensions.append(labels.name(place, size) if alike else labels.apart(size))
    count = len(call.operands)
    everything = [frozenset(range(count))]
    return labels.signature(map(tuple, named[:count]), map(tuple, named[count:]), linear=everything)


def whole_along(call: Call) -> Signature | None:
    """Elements move along some dimensions, or are summed up there; the shape stays."""
    (shape,) = call.operands
    rank = len(shape)
    dims = call["dims"] if call["dims"] is not None else call["dim"]
    along = set(_listed(dims, max(rank, 1))) if dims not in (None, []) else set(range(rank))
    labels = Labels()
    named = tuple(
        labels.name(place, size, whole=at in along)
        for at, (place, size) in enumerate(zip(positions(rank), shape, strict=True))
    )
    linear = () if call.target.overloadpacket in (aten.cumprod, aten.logcumsumexp) else FIRST
    return labels.signature([named], [named] * len(call.results), linear=linear)


def split(call: Call) -> Signature | None:
    """Cut into equal pieces ``a (piece part) -> a part, a part``, or into others, which cannot be split."""
    before = call.operands[0]
    at = call["dim"] % len(before)
    labels, named = _but(before, at, whole=False)
    joined, pieces = _pieces(labels, before[at], [shape[at] for shape in call.results])
    return labels.signature([_with(named, at, joined)], [_with(named, at, piece) for piece in pieces], linear=FIRST)


def glu(call: Call) -> Signature | None:
    """Half of a dimension times what the other half lets through: ``a (piece part) -> a part``."""
    before, (after,) = call.operands[0], call.results
    at = call["dim"] % len(before)
    labels, named = _but(before, at, whole=False)
    joined, pieces = _pieces(labels, before[at], [after[at]] * 2)
    return labels.signature([_with(named, at, joined)], [_with(named, at, pieces[0])])


def unbind(call: Call) -> Signature | None:
    """Each place of a dimension."""
    before = call.operands[0]
    at = call["dim"] % len(before)
    labels, operand = _but(before, at)
    return labels.signature([operand], [operand[:at] + operand[at + 1 :]] * len(call.results), linear=FIRST)


def cat(call: Call) -> Signature | None:
    """The inverse of `split`: ``a b, a b -> a (piece b)``."""
    (after,) = call.results
    at = call["dim"] % len(after)
    if any(len(shape) != len(after) for shape in call.operands):  # an empty one of no shape, which eager allows
        return _nothing_split(call)
    labels, named = _but(after, at, whole=False)
    joined, pieces = _pieces(labels, after[at], [shape[at] for shape in call.operands])
    operands = [_with(named, at, piece) for piece in pieces]
    return labels.signature(operands, [_with(named, at, joined)], linear=[frozenset(range(len(operands)))])


def _pieces(labels: Labels, size: int, pieces: Sequence[int]) -> tuple[Dimension, list[Dimension]]:
    """A dimension, and what it is cut into."""
    if all(same_size(pieces[0], piece) for piece in pieces):
        part = labels.name("part", pieces[0])
        return labels.name("piece", len(pieces), whole=True) + part, [part] * len(pieces)
    return labels.apart(size), [labels.apart(piece) for piece in pieces]


def _with(named: Dimensions, at: int, dimension: Dimension) -> Dimensions:
    return (*named[:at], dimension, *named[at + 1 :])


def stack(call: Call) -> Signature | None:
    """``a b, a b -> a piece b``."""
    (after,) = call.results
    at = call["dim"] % len(after)
    labels, named = _but(after, at)
    operands = [named[:at] + named[at + 1 :]] * len(call.operands)
    return labels.signature(operands, [named], linear=[frozenset(range(len(operands)))])


def repeat(call: Call) -> Signature | None:
    """``a b -> (times a) b``, with more dimensions in front."""
    (before,), times = call.operands, call["repeats"]
    labels = Labels()
    operand = tuple(map(labels.name, positions(len(before)), before))
    outer = [labels.name(f"times{at}", count, whole=True) for at, count in enumerate(times)]
    inner = [()] * (len(times) - len(before)) + list(operand)
    result = tuple(one + other for one, other in zip(outer, inner, strict=True))
    return labels.signature([operand], [result], linear=FIRST)


def repeat_interleave(call: Call) -> Signature | None:
    """``a b -> (a times) b``, along all dimensions at once if along none."""
    if call.target is not aten.repeat_interleave.self_int:
        return None
    before = call.operands[0]
    labels = Labels()
    operand = tuple(map(labels.name, positions(len(before)), before))
    times = labels.name("times", call["repeats"], whole=True)
    if call["dim"] is None:
        return labels.signature([operand], [(sum(operand, ()) + times,)], linear=FIRST)
    at = call["dim"] % len(before)
    return labels.signature([operand], [(*operand[:at], operand[at] + times, *operand[at + 1 :])], linear=FIRST)


def scatter_slice(call: Call) -> Signature | None:
    """``a b, a c -> a b``: a piece is put in the place of another."""
    before, piece = call.operands
    at = call["dim"] % len(before)
    labels, named = _but(before, at)
    return labels.signature([named, _with(named, at, labels.apart(piece[at]))], [named], linear=[frozenset({0, 1})])


def scatter_select(call: Call) -> Signature | None:
    """``a b c, a c -> a b c``: what is at one place is put there."""
    before = call.operands[0]
    at = call["dim"] % len(before)
    labels, named = _but(before, at)
    return labels.signature([named, named[:at] + named[at + 1 :]], [named], linear=[frozenset({0, 1})])


def _nothing_split(call: Call) -> Signature | None:
    """Every dimension is needed whole."""
    labels = Labels()
    operands = [tuple(map(labels.apart, shape)) for shape in call.operands]
    return labels.signature(operands, [tuple(map(labels.apart, shape)) for shape in call.results])


def _but(shape: Shape, at: int, *, whole: bool = True) -> tuple[Labels, Dimensions]:
    """Labels by position; that of dimension `at` cannot be split, or is left to the caller if not `whole`."""
    labels = Labels()
    named = tuple(
        labels.name(place, size, whole=index == at) if whole or index != at else ()
        for index, (place, size) in enumerate(zip(positions(len(shape)), shape, strict=True))
    )
    return labels, named


_RESHAPES = (aten.view, aten.reshape, aten.view_as, aten.reshape_as, aten._unsafe_view, aten.flatten, aten.unflatten,
    aten.unsqueeze, aten._reshape_copy, aten.ravel)  # fmt: skip
_PERMUTATIONS = (aten.permute, aten.transpose, aten.t, aten.movedim, aten.moveaxis, aten.swapaxes, aten.swapdims)

RULES: Mapping[object, Rule] = {
    **dict.fromkeys(_RESHAPES, reshape),
    **dict.fromkeys(_PERMUTATIONS, permute),
    **dict.fromkeys((aten.expand, aten.expand_as, aten.broadcast_to), expand),
    **dict.fromkeys((aten.split, aten.split_with_sizes, aten.chunk, aten.unsafe_split), split),
    **dict.fromkeys((aten.cat, aten.concat, aten.concatenate), cat),
    **dict.fromkeys((aten.pad, aten.constant_pad_nd, aten.reflection_pad1d, aten.replication_pad1d), pad),
    **dict.fromkeys((aten.flip, aten.roll, aten.cumsum, aten.cumprod, aten.logcumsumexp), whole_along),
    **dict.fromkeys((aten.slice, aten.narrow), cut),
    aten.broadcast_tensors: broadcast_tensors,
    aten.diff: difference,
    aten.glu: glu,
    aten.select: select,
    aten.squeeze: squeeze,
    aten.unbind: unbind,
    aten.stack: stack,
    aten.repeat: repeat,
    aten.repeat_interleave: repeat_interleave,
    aten.slice_scatter: scatter_slice,
    aten.select_scatter: scatter_select,
}
