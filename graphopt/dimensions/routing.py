"""Rows that are sorted by group and worked on group by group: tokens by the expert that they are routed to.

What comes of it does not depend on how rows of one group stand, nor on which rows there are beside: each rank of an
axis can sort its part of the rows by itself. The sorted rows are then no part of what the program would sort, and their
places in the part are no places in the whole, so both are parts in an `Order`, which no other call may take.

    ids                           a part
    sort(ids)                     sorted ids, by group; places
    places // k                   places
    rows[places]                  rows of the part, by group
    histc(sorted ids), cumsum     ends of groups
    grouped product               with the matrices of all groups: by group; with those of some: of own groups
    put(empty, places, arange)    places, from where they stand now
    sorted rows[those]            a part again
"""

import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import fx

from graphopt._torch import OpOverload, argument
from graphopt.dimensions.forms import VARYING, Form, Order, Part, Standing
from graphopt.dimensions.matrix import is_grouped_product
from graphopt.dimensions.signature import operands_of
from graphopt.dimensions.strategies import Cut, Strategy, even_chunk

aten = torch.ops.aten
_SORTS = (aten.sort, aten.argsort)
_BLANKS = (aten.empty_like, aten.zeros_like)
_COUNTS = (aten.histc, aten.bincount)
_CASTS = (aten._to_copy, aten.clone, aten.alias)


@dataclass
class Routing:
    """What is sorted by the ids that one call sorts.

    places: of each value that is places, how many sorted rows a row of what it points at has. back: those of them that
    lead from where rows stood to where they stand now. calls: that have strategies of their own.
    """

    sort: fx.Node
    sorted_ids: set[fx.Node] = field(default_factory=set)
    places: dict[fx.Node, int] = field(default_factory=dict)
    back: set[fx.Node] = field(default_factory=set)
    ends: set[fx.Node] = field(default_factory=set)
    calls: list[fx.Node] = field(default_factory=list)

    def strategies(self, part: Part, ranks: int, room: float | None) -> Iterator[tuple[fx.Node, Strategy]]:
        """How the calls run where a rank has `part` of the ids.

        room: for how many rows that are sent to it a rank has room, as a multiple of its own, where products run with
        the matrices of some groups; None where they run with those of all.
        """
        forms = _Forms(part, operands_of(self.products[0])[2])
        yield self.sort, forms.strategy([part], self._sorted(forms))
        for node in self.calls:
            found = self._strategy(node, forms)
            if found is not None:
                yield node, found
            elif is_grouped_product(node):
                product = _all_groups(node, forms) if room is None else _dispatched(node, forms, ranks, room)
                if product is not None:
                    yield node, product

    @property
    def products(self) -> list[fx.Node]:
        """Those by group."""
        return [node for node in self.calls if is_grouped_product(node)]

    def _sorted(self, forms: "_Forms") -> list[Form]:
        return [forms.places] if _is(self.sort, aten.argsort) else [forms.grouped, forms.places]

    def _strategy(self, node: fx.Node, forms: "_Forms") -> Strategy | None:
        """Of the calls that are no products; None if there is none."""
        operands = operands_of(node)
        if node in self.places and not _is(node, operator.getitem):
            return forms.strategy([forms.places] * len(operands), [forms.places])
        if node in self.ends:
            of_ids = _is(node, *_COUNTS)
            ends = forms.ends(node)
            return forms.strategy([forms.grouped if of_ids else ends], [ends])
        if not _is(node, aten.index) or operands[-1] not in self.places:
            return None
        places = operands[-1]
        if places in self.back:
            return forms.strategy([forms.grouped, forms.places], [forms.part])
        source = forms.of_source(self.places[places])
        return None if source is None else forms.strategy([source, forms.places], [forms.grouped])


def routings(nodes: Sequence[fx.Node]) -> dict[fx.Node, Routing]:
    """Those of a program, of which all calls are given in order; by what sorts."""
    found: dict[fx.Node, Routing] = {}
    for node in nodes:
        if _is(node, *_SORTS) and _is_list_of_ids(node):
            found[node] = _followed(Routing(node), nodes)
    return {sort: routing for sort, routing in found.items() if routing.products}


def _followed(routing: Routing, nodes: Sequence[fx.Node]) -> Routing:
    """What is made of the sorted ids, and of where they came from."""
    for node in nodes:
        sources = operands_of(node)
        if node is routing.sort:
            if _is(node, aten.argsort):
                routing.places[node] = 1
        elif _is(node, operator.getitem) and node.args[0] is routing.sort:
            _take_item(routing, node)
        elif any(source in routing.places for source in sources):
            _follow_places(routing, node)
            if _is(node, aten.index) and sources[0] is operands_of(routing.sort)[0]:
                routing.sorted_ids.add(node)
            routing.calls.append(node)
        elif _counts_groups(routing, node):
            routing.ends.add(node)
            routing.calls.append(node)
        elif _is(node, *_CASTS) and sources[0] in routing.sorted_ids:
            routing.sorted_ids.add(node)
        elif is_grouped_product(node) and sources[-1] in routing.ends:
            routing.calls.append(node)
    return routing


def _counts_groups(routing: Routing, node: fx.Node) -> bool:
    """Whether a call says how many rows each group has, or where it ends."""
    sources = operands_of(node)
    if _is(node, *_COUNTS):
        return sources[0] in routing.sorted_ids
    return _is(node, aten.cumsum, *_CASTS) and sources[0] in routing.ends


def _take_item(routing: Routing, item: fx.Node) -> None:
    if item.args[1] == 0:
        routing.sorted_ids.add(item)
    else:
        routing.places[item] = 1


def _follow_places(routing: Routing, node: fx.Node) -> None:
    """What a call that reads places gives."""
    if _is(node, aten.floor_divide) and type(node.args[1]) is int:
        source = node.args[0]
        if isinstance(source, fx.Node) and source not in routing.back:
            routing.places[node] = routing.places[source] * node.args[1]
    elif _is(node, *_BLANKS):
        routing.places[node] = 1
        routing.back.add(node)
    elif _is(node, aten.index_put) and node.args[0] in routing.back and _counts_up(node.args[2]):
        routing.places[node] = 1
        routing.back.add(node)
        assert isinstance(node.args[2], fx.Node)
        routing.places[node.args[2]] = 1
        routing.calls.append(node.args[2])
    elif _is(node, aten.argsort):
        routing.places[node] = 1
        routing.back.add(node)


@dataclass(frozen=True)
class _Forms:
    """Of what is sorted by ids of which a rank has a part."""

    part: Part
    by: fx.Node

    @property
    def grouped(self) -> Part:
        return self._standing(Standing.GROUPED)

    @property
    def places(self) -> Part:
        return self._standing(Standing.PLACES)

    def ends(self, node: fx.Node) -> Part:
        """Of as many groups as there are."""
        return Part(0, int(node.meta["val"].shape[0]), 1, self.order(Standing.ENDS))

    def of_source(self, times: int) -> Part | None:
        """The part of what has a row for so many ids."""
        if self.part.chunk % times:
            return None
        return replace(self.part, chunk=self.part.chunk // times)

    def strategy(self, operands: list[Form], results: list[Form]) -> Strategy:
        return Strategy(Cut("rows", self.part.blocks, self.part.chunk), tuple(operands), tuple(results))

    def order(self, standing: Standing) -> Order:
        return Order(standing, self.by, self.part)

    def _standing(self, standing: Standing) -> Part:
        return replace(self.part, order=self.order(standing))


def _all_groups(product: fx.Node, forms: _Forms) -> Strategy:
    """The rank's rows with the matrices of all groups."""
    ends = forms.ends(operands_of(product)[2])
    return forms.strategy([forms.grouped, VARYING, ends], [forms.grouped])


def _dispatched(product: fx.Node, forms: _Forms, ranks: int, room: float) -> Strategy | None:
    """The rows of some groups, of which the rank has the matrices."""
    groups = even_chunk(operands_of(product)[1].meta["val"].shape[0], ranks)
    if groups is None:
        return None
    most = math.ceil(forms.part.blocks * forms.part.chunk * room)
    rows = Part(0, 1, most, forms.order(Standing.DISPATCHED))
    ends = Part(0, 1, groups, forms.order(Standing.DISPATCHED_ENDS))
    return forms.strategy([rows, Part(0, 1, groups), ends], [rows])


def _is(node: fx.Node, *targets: object) -> bool:
    target = node.target
    return target in targets or (isinstance(target, OpOverload) and target.overloadpacket in targets)


def _is_list_of_ids(sort: fx.Node) -> bool:
    value = operands_of(sort)[0].meta["val"]
    return value.dim() == 1 and not value.dtype.is_floating_point and not _given(sort, "descending")


def _given(node: fx.Node, name: str) -> object:
    assert isinstance(node.target, OpOverload)
    return argument(node.target, name, node.args, node.kwargs)


def _counts_up(node: object) -> bool:
    """Whether a value is 0, 1, 2 and so on."""
    return isinstance(node, fx.Node) and node.target is aten.arange.default
