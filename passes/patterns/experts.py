"""Tokens by expert and back, and products by group, as Transformers and `graphopt.experts` spell them out.

    numbers, order = sort(chosen);  ends = cumsum(histc(numbers, experts));  rows = x[order // k]
    rows = grouped product(rows, matrices, ends)
    places[order] = arange;  y = (rows * weights[order])[places].view(tokens, k, width).sum(1)

Each line is found on its own, so what a split has put between them, as moves of rows between ranks, is no hindrance.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from graphopt.dimensions.matrix import is_grouped_product
from graphopt.dimensions.notation import same_shape, same_size
from graphopt.dimensions.signature import operands_of
from graphopt.ir import facts_of
from graphopt.passes.patterns.fusion import Fusion, Replacements, Site, Writer
from graphopt.passes.patterns.pattern import (
    Found,
    Pattern,
    argument_of,
    bind,
    call,
    casts_between,
    dtype_of,
    is_last,
    item_source,
    items_of,
    packet_of,
    uncast,
)
from graphopt.triton_kernels.experts.permutation import op as permutation
from graphopt.triton_kernels.experts.products import op as products

aten = torch.ops.aten
_RESHAPES = frozenset({aten.reshape, aten.view, aten._unsafe_view})
_CASTS = frozenset({aten._to_copy, aten.type_as})


def _order_of(value: Any) -> Any:
    """The call that sorts numbers of experts, where a value is which of them stands where; None if it is not."""
    sort: Any = value if packet_of(value) is aten.argsort else item_source(value, 1, aten.sort)
    if sort is None or argument_of(sort, "descending"):
        return None
    ids = sort.args[0].meta["val"]
    return sort if ids.dim() == 1 and ids.dtype == torch.int64 else None


def _inverse_of(value: Any) -> Any:
    """What an order is of which a value is the inverse; None if it is of none."""
    if packet_of(value) is aten.argsort and not argument_of(value, "descending"):
        order = value.args[0]
        return order if _order_of(order) is not None else None
    if packet_of(value) is not aten.index_put or argument_of(value, "accumulate"):
        return None
    blank, places, numbers = value.args[:3]
    if len(places) != 1 or packet_of(numbers) is not aten.arange or not _counts_from_zero(numbers):
        return None
    (order,) = places
    is_like = blank.meta["val"].dim() == 1 and same_shape(blank.meta["val"].shape, order.meta["val"].shape)
    is_whole = same_shape(numbers.meta["val"].shape, order.meta["val"].shape)
    return order if is_like and is_whole and _order_of(order) is not None else None


def _counts_from_zero(node: fx.Node) -> bool:
    starts = argument_of(node, "start") in (None, 0)
    return starts and argument_of(node, "step") in (None, 1)


def _inverse(value: Any, found: Found) -> Iterator[Found]:
    """Where each choice stands, of choices sorted by the numbers of their experts, whose ends are counted."""
    order = _inverse_of(value)
    sort = None if order is None else _order_of(order)
    if sort is None or dtype_of(value) != torch.int64:
        return
    ids = sort.args[0]
    if packet_of(sort) is aten.argsort:
        numbers = [user for user in order.users if _is_index(user) and user.args[0] is ids]
    else:
        numbers = items_of(sort, 0)
    counts = [user for each in numbers for user in _converted(each) if packet_of(user) is aten.histc]
    sizes = {tuple(argument_of(count, name) for name in ("bins", "min", "max")) for count in counts}
    if len(sizes) != 1:
        return
    ((experts, least, most),) = sizes
    if isinstance(experts, int) and (least, most) == (0, experts - 1) and experts > 1:
        ends = [user for count in counts for user in _converted(count) if _is_running_sum(user)]
        bound = {"ids": ids, "sort": sort, "order": order, "numbers": numbers, "ends": ends, "experts": experts}
        for name, each in bound.items():
            found = found.binding(name, each)
        yield found.through(value)


def _converted(node: fx.Node) -> Iterator[fx.Node]:
    """What reads a value, perhaps in another dtype."""
    for user in node.users:
        yield user
        if packet_of(user) in _CASTS:
            yield from _converted(user)


def _is_running_sum(node: fx.Node) -> bool:
    return packet_of(node) is aten.cumsum and node.args[1] in (0, -1) and dtype_of(node) == torch.int32


def _is_index(node: Any) -> bool:
    return packet_of(node) is aten.index and len(node.args[1]) == 1


def _fits_sorting(site: Site) -> bool:
    """Nothing else reads what the sort gives, and where experts end is asked for."""
    wheres = {(facts_of(node).layer, facts_of(node).checkpoint) for node in (site.root, site["sort"], *site["ends"])}
    return bool(site["ends"]) and len(wheres) == 1


def _write_sorting(writer: Writer) -> Replacements:
    site = writer.site
    with writer.before(site["sort"]):
        sorted_ = writer.call(permutation.SORT_BY_EXPERT, site["ids"], site["experts"])
        order, places, ends = (writer.item(sorted_, index) for index in range(3))
        numbers = writer.call(aten.index.Tensor, site["ids"], [order])
    replaced = {site.root: places, site["order"]: order}
    return replaced | dict.fromkeys(site["ends"], ends) | dict.fromkeys(site["numbers"], numbers)


def _permuted(value: Any, found: Found) -> Iterator[Found]:
    """Each token's row for each of its choices, sorted."""
    if not _is_index(value):
        return
    places, top_k = value.args[1][0], 1
    if packet_of(places) is aten.floor_divide and type(places.args[1]) is int:
        places, top_k = places.args
    sorted_ = item_source(places, 0, permutation.SORT_BY_EXPERT.overloadpacket)
    if sorted_ is not None:
        yield found.binding("x", value.args[0]).binding("sorted", sorted_).binding("top_k", top_k).through(value)


def _fits_permuted(site: Site) -> bool:
    """All tokens have as many choices, and rows of more than a number."""
    x = site.value("x")
    return x.dim() == 2 and not same_size(x.shape[1], 1) and same_size(x.shape[0] * site["top_k"], site.result.shape[0])


def _write_permuted(writer: Writer) -> Replacements:
    site = writer.site
    with writer.before(site.root):
        places = writer.call(aten.reshape.default, writer.item(site["sorted"], 1), [-1, site["top_k"]])
        return {site.root: writer.call(permutation.PERMUTE_TOKENS, site["x"], places)}


def _summed(value: Any, found: Found) -> Iterator[Found]:
    """Each token's sum over its choices of rows that are sorted."""
    node = uncast(value)
    if packet_of(node) is not aten.sum or argument_of(node, "keepdim") or argument_of(node, "dim") not in ([1], [-2]):
        return
    by_token = node.args[0]
    if packet_of(by_token) not in _RESHAPES or by_token.meta["val"].dim() != 3:
        return
    unsorted = by_token.args[0]
    if not _is_index(unsorted) or unsorted.meta["val"].dim() != 2:
        return
    rows, (places,) = unsorted.args
    order = _inverse_of(places)
    if order is None or not same_size(unsorted.meta["val"].shape[1], by_token.meta["val"].shape[2]):
        return
    casts = casts_between(value, node)
    found = found.binding("places", places).binding("by_token", by_token).through(*casts, node, by_token, unsorted)
    yield from call(aten.mul, bind("rows"), _gathered(order))(rows, found)
    yield from bind("rows")(rows, found)


def _gathered(order: fx.Node) -> Pattern:
    """Weights of all choices, flat, in an order; one for a row."""

    def match(value: Any, found: Found) -> Iterator[Found]:
        outer = uncast(value)
        inner: Any = outer.args[0] if packet_of(outer) in (aten.unsqueeze, aten.index) else None
        index, column = (outer, inner) if _is_index(outer) else (inner, outer)
        if not _is_index(index) or index.args[1][0] is not order or packet_of(column) is not aten.unsqueeze:
            return
        weights = inner.args[0]
        if weights.meta["val"].dim() == 1 and is_last(column.args[1], column):
            yield found.binding("weights", weights).through(*casts_between(value, outer), outer, inner)

    return match


def _fits_summed(site: Site) -> bool:
    rows = site.value("rows")
    weights = None if site["weights"] is None else dtype_of(site["weights"])
    return rows.dim() == 2 and rows.dtype == site.result.dtype and weights in (None, rows.dtype, torch.float32)


def _write_summed(writer: Writer) -> Replacements:
    site = writer.site
    tokens, top_k = site["by_token"].args[1][:2]
    with writer.before(site.root):
        places, weights = (
            None if flat is None else writer.call(aten.reshape.default, flat, [tokens, top_k])
            for flat in (site["places"], site["weights"])
        )
        return {site.root: writer.call(permutation.UNPERMUTE_TOKENS, site["rows"], weights, places)}


def _product(value: Any, found: Found) -> Iterator[Found]:
    """Of rows by group, by another operator."""
    if not isinstance(value, fx.Node) or value.target is products.GROUPED_MM or not is_grouped_product(value):
        return
    if len(value.all_input_nodes) == 3 and argument_of(value, "out_dtype") is None:
        for name, operand in zip(("rows", "matrices", "ends"), operands_of(value), strict=True):
            found = found.binding(name, operand)
        yield found.through(value)


def _fits_product(site: Site) -> bool:
    rows, matrices = site.value("rows"), site.value("matrices")
    return rows.dtype == matrices.dtype == site.result.dtype and site.value("ends").dtype == torch.int32


def _write_product(writer: Writer) -> Replacements:
    site = writer.site
    with writer.before(site.root):
        operands = (site["rows"], site["matrices"], site["ends"])
        return {site.root: writer.call(products.GROUPED_MM, *operands)}


FUSIONS = (
    Fusion("unpermute_tokens", permutation.FAMILY, _summed, of="rows", fits=_fits_summed, write=_write_summed),
    Fusion("sort_by_expert", permutation.SORTING, _inverse, of="ids", fits=_fits_sorting, write=_write_sorting),
    Fusion("permute_tokens", permutation.FAMILY, _permuted, of="x", fits=_fits_permuted, write=_write_permuted),
    Fusion("grouped_mm", products.FAMILY, _product, of="rows", fits=_fits_product, write=_write_product),
)
