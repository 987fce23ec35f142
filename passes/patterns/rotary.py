"""Rotary embedding of queries and of keys by the same angles, which one kernel turns together.

    x * cos + rotated(x) * sin

of all of a row or of its first elements, pairs half a width apart or side by side. Angles are given for each element,
and those of a pair must be seen to be one: made by joining a tensor to itself, or by repeating each element. Or pair by
pair, of all of a row, with an angle for each; those side by side may come out half a width apart:

    joined(a * cos - b * sin, b * cos + a * sin)
"""

from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import fx

from graphopt.dimensions.notation import same_shape
from graphopt.ir import facts_of
from graphopt.passes.patterns.fusion import Fusion, Replacements, Site, Writer
from graphopt.passes.patterns.pattern import (
    Found,
    Pattern,
    bind,
    call,
    cast_source,
    dtype_of,
    either,
    packet_of,
    part_of,
)
from graphopt.triton_kernels.rotary.op import FAMILY, ROTARY

aten = torch.ops.aten
_KEEPS_PAIRS = frozenset({aten.cos, aten.sin, aten.unsqueeze, aten.expand, aten.clone})


def _turned(value: Any, found: Found) -> Iterator[Found]:
    """A tensor of which all is turned, or the first elements of each row."""
    whole = call(aten.add, call(aten.mul, bind("x"), _angle("cos")), call(aten.mul, _rotated, _angle("sin")))
    yield from whole(value, found)
    if packet_of(value) is aten.cat and _is_last(value, value.args[1:]) and len(value.args[0]) == 2:
        first, rest = value.args[0]
        for each in whole(first, found):
            x = each["x"]
            one, other = part_of(x), part_of(rest)
            width = x.meta["val"].shape[-1]
            if one is not None and other is not None and one.source is other.source:
                total = one.source.meta["val"].shape[-1]
                if one.indices == range(width) and other.indices == range(width, total):
                    yield each.binding("x", one.source).through(value, *one.calls, *other.calls)


def _by_pairs(value: Any, found: Found) -> Iterator[Found]:
    """All of a row, of which the first and the second elements of pairs are turned apart, then joined."""
    inner = [value]
    if packet_of(value) in (aten.reshape, aten.flatten) and packet_of(value.args[0]) is aten.stack:
        value = value.args[0]
        inner.append(value)
    if packet_of(value) not in (aten.cat, aten.stack) or not _is_last(value, value.args[1:]) or len(value.args[0]) != 2:
        return
    cos, sin = _angle_of_pair("cos"), _angle_of_pair("sin")
    a, b = bind("first"), bind("second")
    one = call(aten.sub, call(aten.mul, a, cos), call(aten.mul, b, sin))
    other = call(aten.add, call(aten.mul, b, cos), call(aten.mul, a, sin))
    for way in one(value.args[0][0], found.through(*inner)):
        for each in other(value.args[0][1], way):
            first, second = part_of(each["first"]), part_of(each["second"])
            if first is None or second is None or first.source is not second.source:
                continue
            width = first.source.meta["val"].shape[-1]
            is_interleaved, joins_pairs = first.indices.step == 2, packet_of(value) is aten.stack
            is_split = width % 2 == 0 and (first.indices, second.indices) == _parts_of_pairs(width, is_interleaved)
            if is_split and (is_interleaved or not joins_pairs):
                site = each.binding("x", first.source).binding("width", width).binding("interleaved", is_interleaved)
                yield site.binding("apart", not joins_pairs and is_interleaved).through(*first.calls, *second.calls)


def _parts_of_pairs(width: int, is_interleaved: bool) -> tuple[range, range]:
    """Where the first and the second elements of pairs lie."""
    if is_interleaved:
        return range(0, width, 2), range(1, width, 2)
    return range(width // 2), range(width // 2, width)


def _rotated(value: Any, found: Found) -> Iterator[Found]:
    """Each pair (a, b) of x as (-b, a)."""
    inner = [value]
    if packet_of(value) in (aten.reshape, aten.flatten) and packet_of(value.args[0]) is aten.stack:
        value = value.args[0]
        inner.append(value)
    if packet_of(value) not in (aten.cat, aten.stack) or not _is_last(value, value.args[1:]):
        return
    if len(value.args[0]) != 2 or packet_of(value.args[0][0]) is not aten.neg:
        return
    negated, plain = value.args[0]
    second, first = part_of(negated.args[0]), part_of(plain)
    if second is None or first is None or second.source is not first.source:
        return
    width = first.source.meta["val"].shape[-1]
    is_interleaved = packet_of(value) is aten.stack
    if (first.indices, second.indices) == _parts_of_pairs(width, is_interleaved) and width % 2 == 0:
        inside = found.binding("interleaved", is_interleaved).binding("width", width)
        inside = inside.through(*inner, negated, *first.calls, *second.calls)
        yield from bind("x")(first.source, inside)


def _angle(name: str) -> Pattern:
    """Angles for each element [batch or 1, positions, width], with a dimension for heads put in.

    The name stands for what they are made of: for each pair, if those are side by side.
    """

    def match(value: Any, found: Found) -> Iterator[Found]:
        repeated = packet_of(value) is aten.repeat_interleave and value.args[1] == 2 and _is_last(value, value.args[2:])
        spread = value.args[0] if repeated else value
        if packet_of(spread) is not aten.unsqueeze or spread.meta["val"].dim() != 4:
            return
        angles, heads = spread.args
        kind = (heads % 4, repeated)
        if found["kind"] in (None, kind) and (repeated or _is_doubled(angles)):
            yield found.binding("kind", kind).binding(name, angles)

    return match


def _angle_of_pair(name: str) -> Pattern:
    """Angles for each pair [batch or 1, positions, width / 2], with a dimension for heads put in."""

    def match(value: Any, found: Found) -> Iterator[Found]:
        if packet_of(value) is not aten.unsqueeze or value.meta["val"].dim() != 4:
            return
        angles, heads = value.args
        kind = (heads % 4, True)
        if found["kind"] in (None, kind) and found[name] in (None, angles):
            yield found.binding("kind", kind).binding(name, angles)

    return match


def _is_doubled(node: Any) -> bool:
    """Whether both halves of each row are seen to be equal."""
    while True:
        operator = packet_of(node)
        if operator is aten.cat:
            given = node.args[0]
            return len(given) == 2 and given[0] is given[1] and _is_last(node, node.args[1:])
        by_number = operator is aten.mul and not isinstance(node.args[1], fx.Node)
        keeps = operator in _KEEPS_PAIRS and same_shape(
            node.meta["val"].shape[-1:], node.args[0].meta["val"].shape[-1:]
        )
        if not (by_number or keeps or cast_source(node) is not None):
            return False
        node = node.args[0]


def _is_last(node: fx.Node, dims: Any) -> bool:
    """Whether the dimension that a call is given is the last of its result."""
    return len(dims) == 1 and dims[0] in (-1, node.meta["val"].dim() - 1)


def _fits(site: Site) -> bool:
    x, cos, sin = site.value("x"), site.value("cos"), site.value("sin")
    heads, is_repeated = site["kind"]
    wanted = site["width"] // 2 if is_repeated else site["width"]
    if x.dim() != 4 or heads not in (1, 2):
        return False
    fits = same_shape(cos.shape, sin.shape) and any(
        same_shape(cos.shape, (rows, x.shape[3 - heads], wanted)) for rows in (1, x.shape[0])
    )
    is_alike = same_shape(site.result.shape, x.shape) and site.result.dtype == x.dtype
    is_constant = not {site["cos"], site["sin"]} & site.varying
    is_of_kind = is_repeated == site["interleaved"] or site["first"] is not None
    return fits and is_alike and is_constant and is_of_kind


def _together(site: Site) -> Hashable:
    """What queries and keys have in common."""
    facts, (heads, _) = facts_of(site.root), site["kind"]
    sizes = tuple(str(size) for d, size in enumerate(site.value("x").shape) if d != heads)
    angles = (site["cos"], site["sin"], site["width"], site["kind"], site["interleaved"], site["apart"])
    return (*angles, sizes, dtype_of(site["x"]), facts.layer, facts.checkpoint)


def _write(writer: Writer) -> Replacements:
    """Those of the site, and of the other one; nothing if one is read before the other is there."""
    assert writer.other is not None
    sites = sorted((writer.site, writer.other), key=lambda site: site.place[site.root])
    (first, second), place = sites, writer.site.place
    if max(place.get(site[name], -1) for site in sites for name in ("x", "cos", "sin")) < place[first.root]:
        anchor = first.root
    elif all(place.get(user, len(place)) > place[second.root] for user in first.root.users):
        anchor = second.root
    else:
        return {}
    heads, is_repeated = first["kind"]
    with writer.before(anchor):
        tensors = [site["x"] for site in sites]
        if heads == 2:
            tensors = [writer.call(aten.transpose.int, x, 1, 2) for x in tensors]
        angles = [first["cos"], first["sin"]]
        if not is_repeated:
            angles = [writer.call(aten.slice.Tensor, angle, 2, 0, first["width"] // 2) for angle in angles]
        options = (first["interleaved"], False, *([True] if first["apart"] else []))
        turned = writer.call(ROTARY, *tensors, *angles, *options)
        found = [writer.item(turned, index) for index in (0, 1)]
        if heads == 2:
            found = [writer.call(aten.transpose.int, x, 1, 2) for x in found]
        return {site.root: x for site, x in zip(sites, found, strict=True)}


FUSIONS = (Fusion("rotary", FAMILY, either(_turned, _by_pairs), of="x", fits=_fits, write=_write, together=_together),)
