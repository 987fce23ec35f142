"""A mixture of experts as Transformers and `graphopt.experts` spell it out: routing, tokens by expert and back, products.

    picked, chosen = topk(softmax(logits), k);  weights = picked / picked.sum()
    numbers, order = sort(chosen);  ends = cumsum(histc(numbers, experts));  rows = x[order // k]
    rows = grouped product(rows, matrices, ends)
    places[order] = arange;  y = (rows * weights[order])[places].view(tokens, k, width).sum(1)

Each line is found on its own, so what a split has put between them, as moves of rows between ranks, is no hindrance.
"""

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from graphopt._torch import argument
from graphopt.dimensions.matrix import is_grouped_product
from graphopt.dimensions.notation import same_shape, same_size
from graphopt.dimensions.signature import operands_of
from graphopt.ir import facts_of
from graphopt.passes.patterns.fusion import Fusion, Replacements, Site, Writer
from graphopt.passes.patterns.pattern import Found, Pattern, bind, call, cast_source, dtype_of, packet_of, uncast
from graphopt.triton_kernels.experts.permutation import op as permutation
from graphopt.triton_kernels.experts.products import op as products
from graphopt.triton_kernels.experts.routing import op as routing

aten = torch.ops.aten
_RESHAPES = frozenset({aten.reshape, aten.view, aten._unsafe_view, aten.flatten})
_CASTS = frozenset({aten._to_copy, aten.to})


def _item(value: Any, index: int, of: Any) -> fx.Node | None:
    """The call that a value is an item of; None if it is no such item."""
    is_item = isinstance(value, fx.Node) and value.target is operator.getitem and value.args[1] == index
    return value.args[0] if is_item and packet_of(value.args[0]) is of else None


def _items(node: fx.Node, index: int) -> list[fx.Node]:
    return [user for user in node.users if user.target is operator.getitem and user.args[1] == index]


def _given(node: fx.Node, name: str) -> Any:
    return argument(node.target, name, node.args, node.kwargs)  # type: ignore[arg-type]


def _is_last(node: fx.Node, dim: Any, like: fx.Node) -> bool:
    return dim in (-1, like.meta["val"].dim() - 1)


# Routing


def _picked(value: Any, found: Found) -> Iterator[Found]:
    """The largest of the softmax of logits; all of that is computed no more, if nothing else reads it."""
    topk = _item(value, 0, aten.topk)
    if topk is None or not _is_last(topk, _given(topk, "dim"), topk.args[0]) or not _given(topk, "largest"):
        return
    softmax = topk.args[0]
    if packet_of(softmax) in (aten.softmax, aten._softmax) and _is_last(softmax, softmax.args[1], softmax):
        for each in bind("logits")(softmax.args[0], found):
            yield each.binding("topk", topk).binding("softmax", softmax).through(value)


def _normalized(value: Any, found: Found) -> Iterator[Found]:
    """Of sum one."""
    node = uncast(value)
    if packet_of(node) is not aten.div or len(node.args) != 2 or node.kwargs:
        return
    picked, total = node.args
    if packet_of(total) is not aten.sum or total.args[0] is not picked or not _given(total, "keepdim"):
        return
    dims = _given(total, "dim")
    if len(dims) == 1 and _is_last(total, dims[0], total):
        inside = found.through(*_calls_to(value, node), node, total).binding("normalized", True)
        yield from _picked(picked, inside)


def _calls_to(value: fx.Node, source: fx.Node) -> Iterator[fx.Node]:
    """The casts between."""
    while value is not source:
        yield value
        before = cast_source(value)
        assert before is not None
        value = before


def _weights(value: Any, found: Found) -> Iterator[Found]:
    yield from _normalized(value, found)
    yield from _picked(value, found.binding("normalized", False))


def _fits_routing(site: Site) -> bool:
    topk, softmax, logits = site["topk"], site["softmax"], site.value("logits")
    is_read_once = all(user in site.found.inner or user.args[1] == 1 for user in topk.users)
    wheres = {(facts_of(node).layer, facts_of(node).checkpoint) for node in (site.root, topk, softmax)}
    is_wide = dtype_of(softmax) == torch.promote_types(logits.dtype, torch.float32)
    is_sized = isinstance(topk.args[1], int) and isinstance(logits.shape[-1], int)
    return logits.dim() == 2 and len(softmax.users) == 1 and is_read_once and len(wheres) == 1 and is_wide and is_sized


def _write_routing(writer: Writer) -> Replacements:
    site = writer.site
    topk = site["topk"]
    with writer.before(topk):
        options = (topk.args[1], "softmax", site["normalized"], 0.0, 1.0, 1, 1)
        routed = writer.call(routing.ROUTE, site["logits"], None, *options)
        weights = writer.cast(writer.item(routed, 0), site.result.dtype)
        chosen = writer.item(routed, 1)
        return {site.root: weights, **dict.fromkeys(_items(topk, 1), chosen)}


# Tokens by expert


def _order_of(value: Any) -> fx.Node | None:
    """The call that sorts numbers of experts, where a value is which of them stands where; None if it is not."""
    sort = value if packet_of(value) is aten.argsort else _item(value, 1, aten.sort)
    if sort is None or _given(sort, "descending"):
        return None
    ids = sort.args[0].meta["val"]
    return sort if ids.dim() == 1 and ids.dtype == torch.int64 else None


def _inverse_of(value: Any) -> fx.Node | None:
    """What an order is of which a value is the inverse; None if it is of none."""
    if packet_of(value) is aten.argsort and not _given(value, "descending"):
        order = value.args[0]
        return order if _order_of(order) is not None else None
    if packet_of(value) is not aten.index_put or _given(value, "accumulate"):
        return None
    blank, places, numbers = value.args[:3]
    if len(places) != 1 or packet_of(numbers) is not aten.arange or not _counts_from_zero(numbers):
        return None
    (order,) = places
    is_like = blank.meta["val"].dim() == 1 and same_shape(blank.meta["val"].shape, order.meta["val"].shape)
    is_whole = same_shape(numbers.meta["val"].shape, order.meta["val"].shape)
    return order if is_like and is_whole and _order_of(order) is not None else None


def _counts_from_zero(node: fx.Node) -> bool:
    return node.target is aten.arange.default or (_given(node, "start") == 0 and _given(node, "step") in (None, 1))


def _inverse(value: Any, found: Found) -> Iterator[Found]:
    """Where each choice stands, of choices sorted by the numbers of their experts, whose ends are counted."""
    order = _inverse_of(value)
    sort = None if order is None else _order_of(order)
    if sort is None or dtype_of(value) != torch.int64:
        return
    ids = sort.args[0]
    if packet_of(sort) is aten.argsort:
        numbers = [user for user in order.users if _is_index(user) and user.args[0] is ids]  # type: ignore[union-attr]
    else:
        numbers = _items(sort, 0)
    counts = [user for each in numbers for user in _converted(each) if packet_of(user) is aten.histc]
    sizes = {tuple(_given(count, name) for name in ("bins", "min", "max")) for count in counts}
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


# Rows of tokens, sorted and back


def _permuted(value: Any, found: Found) -> Iterator[Found]:
    """Each token's row for each of its choices, sorted."""
    if not _is_index(value):
        return
    places, top_k = value.args[1][0], 1
    if packet_of(places) is aten.floor_divide and type(places.args[1]) is int:
        places, top_k = places.args
    sorted_ = _item(places, 0, permutation.SORT_BY_EXPERT.overloadpacket)
    if sorted_ is not None:
        yield found.binding("x", value.args[0]).binding("sorted", sorted_).binding("top_k", top_k).through(value)


def _fits_permuted(site: Site) -> bool:
    """All tokens have as many choices."""
    x = site.value("x")
    return x.dim() == 2 and same_size(x.shape[0] * site["top_k"], site.result.shape[0])


def _write_permuted(writer: Writer) -> Replacements:
    site = writer.site
    with writer.before(site.root):
        places = writer.call(aten.reshape.default, writer.item(site["sorted"], 1), [-1, site["top_k"]])
        return {site.root: writer.call(permutation.PERMUTE_TOKENS, site["x"], places)}


def _summed(value: Any, found: Found) -> Iterator[Found]:
    """Each token's sum over its choices of rows that are sorted."""
    node = uncast(value)
    if packet_of(node) is not aten.sum or _given(node, "keepdim") or _given(node, "dim") not in ([1], [-2]):
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
    casts = _calls_to(value, node)
    found = found.binding("places", places).binding("by_token", by_token).through(*casts, node, by_token, unsorted)
    yield from call(aten.mul, bind("rows"), _gathered(order))(rows, found)
    yield from bind("rows")(rows, found)


def _gathered(order: fx.Node) -> Pattern:
    """Weights of all choices, flat, in an order; one for a row."""

    def match(value: Any, found: Found) -> Iterator[Found]:
        node = uncast(value)
        if packet_of(node) is not aten.unsqueeze or not _is_last(node, node.args[1], node):
            return
        index = node.args[0]
        if _is_index(index) and index.args[1][0] is order and index.args[0].meta["val"].dim() == 1:
            yield found.binding("weights", index.args[0]).through(*_calls_to(value, node), node, index)

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


# Products


def _product(value: Any, found: Found) -> Iterator[Found]:
    """Of rows by group, by another operator."""
    if not isinstance(value, fx.Node) or value.target is products.GROUPED_MM or not is_grouped_product(value):
        return
    if len(value.all_input_nodes) == 3 and _given(value, "out_dtype") is None:
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
    Fusion("route", routing.FAMILY, _weights, of="logits", fits=_fits_routing, write=_write_routing),
)
