"""Which experts a token goes to, of the scores of all.

    picked, chosen = topk(softmax(logits), k)
    chosen = topk(scores + bias, k);  picked = scores[chosen]      scores: softmax or sigmoid, perhaps of some groups
    weights = scale * picked / (picked.sum() + epsilon)

each without what it can do without.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch

from graphopt.dimensions.notation import same_shape
from graphopt.ir import facts_of
from graphopt.passes.patterns.fusion import Fusion, Replacements, Site, Writer
from graphopt.passes.patterns.pattern import (
    Found,
    argument_of,
    bind,
    casts_between,
    dtype_of,
    is_last,
    item_source,
    items_of,
    packet_of,
    uncast,
)
from graphopt.triton_kernels.experts.routing.op import FAMILY, ROUTE

aten = torch.ops.aten
_RESHAPES = frozenset({aten.reshape, aten.view, aten._unsafe_view})
_COPIES = frozenset({*_RESHAPES, aten._to_copy, aten.clone})


def _scored(value: Any, found: Found) -> Iterator[Found]:
    """Softmax or sigmoid of logits."""
    is_softmax = packet_of(value) in (aten.softmax, aten._softmax) and is_last(value.args[1], value)
    if is_softmax or packet_of(value) is aten.sigmoid:
        for each in bind("logits")(value.args[0], found):
            yield each.binding("scores", "softmax" if is_softmax else "sigmoid").binding("scored", value)


def _best(value: Any, index: int) -> Any:
    """The call that takes the largest of each row, of which a value is an item; None if it is none."""
    topk: Any = item_source(value, index, aten.topk)
    is_best = topk is not None and is_last(argument_of(topk, "dim"), topk.args[0]) and argument_of(topk, "largest")
    return topk if is_best else None


def _picked(value: Any, found: Found) -> Iterator[Found]:
    """The largest scores, or those whose keys are the largest: scores with biases, perhaps of some groups."""
    topk = _best(value, 0)
    if topk is not None:
        for each in _scored(topk.args[0], found):
            yield each.binding("topk", topk).through(value)
    if packet_of(value) is not aten.gather or not is_last(value.args[1], value):
        return
    scored, _, chosen = value.args[:3]
    topk = _best(chosen, 1)
    if topk is None:
        return
    for each in _scored(scored, found.binding("topk", topk).through(value)):
        each = _of_groups(topk.args[0], each)
        keys = each["keys"]
        if keys is scored:
            yield each
        elif packet_of(keys) is aten.add and len(keys.args) == 2 and keys.args[0] is scored and not keys.kwargs:
            yield from bind("bias")(keys.args[1], each)


def _of_groups(keys: Any, found: Found) -> Found:
    """With keys before those are left out that are of other groups than the best, and how many there are of both.

    A group's sum of its two largest keys tells: ``topk(topk(keys by group, 2).sum(), n)``, scattered, spread over the
    experts and turned round, is where keys are left out.
    """
    untouched = found.binding("keys", keys)
    if packet_of(keys) is not aten.masked_fill or keys.args[2] != -math.inf:
        return untouched
    all_keys, mask, _ = keys.args
    kept = _negated(mask)
    while packet_of(kept) in _COPIES:
        kept = kept.args[0]
    column: Any = kept.args[0] if packet_of(kept) is aten.expand else None
    if packet_of(column) is not aten.unsqueeze or not is_last(column.args[1], column):
        return untouched
    scattered = column.args[0]
    if packet_of(scattered) is not aten.scatter or not is_last(scattered.args[1], scattered):
        return untouched
    zeros, _, numbers, one = scattered.args[:4]
    of_groups = _best(numbers, 1)
    if packet_of(zeros) is not aten.zeros_like or one not in (1, True) or of_groups is None:
        return untouched
    by_group = _summed_by_two(of_groups.args[0])
    if packet_of(by_group) not in _RESHAPES or by_group.args[0] is not all_keys:
        return untouched
    shape = by_group.meta["val"].shape
    is_spread = len(shape) == 3 and same_shape(shape, kept.meta["val"].shape)
    is_known = is_spread and isinstance(shape[1], int) and isinstance(of_groups.args[1], int)
    if not is_known:
        return untouched
    found = found.binding("keys", all_keys).binding("by_group", by_group)
    return found.binding("groups", shape[1]).binding("top_groups", of_groups.args[1])


def _summed_by_two(totals: Any) -> Any:
    """Of what a value is the sum of the two largest of each row; None if it is none."""
    if packet_of(totals) is not aten.sum or argument_of(totals, "keepdim"):
        return None
    two = _best(totals.args[0], 0)
    is_of_row = two is not None and argument_of(totals, "dim") in ([-1], [2]) and two.args[1] == 2
    return two.args[0] if is_of_row else None


def _negated(value: Any) -> Any:
    is_negated = packet_of(value) in (aten.bitwise_not, aten.logical_not)
    return value.args[0] if is_negated and dtype_of(value) == torch.bool else None


def _normalized(value: Any, found: Found) -> Iterator[Found]:
    """Of sum one, but for what is added to the sum so that it is not zero."""
    node = uncast(value)
    if packet_of(node) is not aten.div or len(node.args) != 2 or node.kwargs:
        return
    picked, total = node.args
    inner, epsilon = [*casts_between(value, node), node, total], 0.0
    if packet_of(total) is aten.add and type(total.args[1]) in (int, float) and not total.kwargs:
        total, epsilon = total.args
        inner.append(total)
    if packet_of(total) is not aten.sum or total.args[0] is not picked or not argument_of(total, "keepdim"):
        return
    dims = argument_of(total, "dim")
    if len(dims) == 1 and is_last(dims[0], total):
        inside = found.through(*inner).binding("normalized", True).binding("epsilon", float(epsilon))
        yield from _picked(picked, inside)


def _unscaled(value: Any, found: Found) -> Iterator[Found]:
    yield from _normalized(value, found)
    yield from _picked(value, found.binding("normalized", False))


def _weights(value: Any, found: Found) -> Iterator[Found]:
    """What the best weigh, times a number or not."""
    node = uncast(value)
    if packet_of(node) is aten.mul and len(node.args) == 2 and type(node.args[1]) in (int, float):
        casts = casts_between(value, node)
        yield from _unscaled(node.args[0], found.binding("scale", float(node.args[1])).through(*casts, node))
    yield from _unscaled(value, found)


def _fits_routing(site: Site) -> bool:
    topk, scored, logits = site["topk"], site["scored"], site.value("logits")
    read_for = {topk, topk.args[0], site["keys"], site["by_group"], *site.found.inner}
    is_alone = all(user in read_for for user in scored.users)
    is_read_once = all(user in site.found.inner or user.args[1] == 1 for user in topk.users)
    wheres = {(facts_of(node).layer, facts_of(node).checkpoint) for node in (site.root, topk, scored)}
    is_wide = dtype_of(scored) == torch.promote_types(logits.dtype, torch.float32)
    is_sized = isinstance(topk.args[1], int) and isinstance(logits.shape[-1], int)
    bias = None if site["bias"] is None else site.value("bias")
    is_bias = bias is None or (bias.dtype == torch.float32 and same_shape(bias.shape, logits.shape[-1:]))
    return logits.dim() == 2 and is_alone and is_read_once and len(wheres) == 1 and is_wide and is_sized and is_bias


def _write_routing(writer: Writer) -> Replacements:
    site = writer.site
    topk = site["topk"]
    with writer.before(topk):
        how = (site["scores"], site["normalized"], site["epsilon"] or 0.0, site["scale"] or 1.0)
        groups = (site["groups"] or 1, site["top_groups"] or 1)
        routed = writer.call(ROUTE, site["logits"], site["bias"], topk.args[1], *how, *groups)
        weights = writer.cast(writer.item(routed, 0), site.result.dtype)
        chosen = writer.item(routed, 1)
        return {site.root: weights, **dict.fromkeys(items_of(topk, 1), chosen)}


FUSIONS = (Fusion("route", FAMILY, _weights, of="logits", fits=_fits_routing, write=_write_routing),)
