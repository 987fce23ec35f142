"""Every way to run every call of a forward program over the ranks of an axis."""

import operator
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from graphopt.dimensions.forms import BALANCED, REPLICATED, VARYING, Form, Order, Part
from graphopt.dimensions.routing import Routing, routings
from graphopt.dimensions.signature import Signature, operands_of
from graphopt.dimensions.strategies import (
    Cut,
    Strategy,
    can_carry,
    cut_by,
    even_chunk,
    has_fixed_blocks,
    own_cuts,
    split_strategy,
    whole_strategies,
)
from graphopt.dimensions.table import signature_of
from graphopt.ir import InputKind, Program

Value = tuple[fx.Node, int]  # what makes it, and which of its results it is
MayCut = Callable[[fx.Node, Signature, Cut], bool]


@dataclass
class Space:
    """calls: the strategies of each call. inputs: the forms in which each input may lie.

    signatures: of the calls that have one. uses: of each value, the calls that read it and as which operand.
    """

    ranks: int
    calls: dict[fx.Node, list[Strategy]] = field(default_factory=dict)
    inputs: dict[fx.Node, list[Form]] = field(default_factory=dict)
    signatures: dict[fx.Node, Signature] = field(default_factory=dict)
    uses: dict[Value, list[tuple[fx.Node, int]]] = field(default_factory=lambda: defaultdict(list))


def value_of(node: fx.Node) -> Value:
    """What a node stands for: one of the results of the call that it takes an item of, or its own."""
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        return node.args[0], int(str(node.args[1]))
    return node, 0


def is_item(node: fx.Node) -> bool:
    """Whether a node only takes one of the results of a call."""
    return node.target is operator.getitem


def space_of(
    program: Program,
    ranks: int,
    may_cut: MayCut,
    lying: Mapping[str, Form],
    *,
    order: Order | None = None,
    room: float | None = None,
) -> Space:
    """All strategies. may_cut: which cuts are allowed. lying: how parameters lie that are split already, by name.

    order: in which ranks have the rows of their parts, where these can be in that order.
    room: for how many rows by group a rank has room, as a multiple of its own, if they go to the ranks that have what
    they are multiplied by; None if each rank has that of all groups.
    """
    space = Space(ranks)
    for role, node in zip(program.inputs, program.placeholders, strict=True):
        splittable = role.kind is InputKind.PARAMETER
        space.inputs[node] = [lying[role.name]] if role.name in lying else _lying(node, ranks if splittable else 1)
    calls = [node for node in program.compute_nodes() if not is_item(node)]
    for node in calls:
        signature = signature_of(node)
        if signature is not None:
            space.signatures[node] = signature
        for index, operand in enumerate(operands_of(node)):
            space.uses[value_of(operand)].append((node, index))
    cuts = _Cuts(space, may_cut, order, routings(program.compute_nodes()), room)
    for node in calls:
        space.calls[node] = list(cuts.strategies_of(node))
    return space


def unsigned(space: Space) -> list[str]:
    """Operators without a signature, which run whole on every rank."""
    return sorted({str(node.target) for node in space.calls if node not in space.signatures})


class _Cuts:
    """The cuts of each call: its own, and those by which it takes or gives the parts of its neighbours."""

    def __init__(
        self,
        space: Space,
        may_cut: MayCut,
        order: Order | None,
        routed: Mapping[fx.Node, Routing],
        room: float | None,
    ) -> None:
        self._space = space
        self._may_cut = may_cut
        self._routed = routed
        self._room = room
        self._cuts: dict[fx.Node, dict[Cut, Strategy]] = defaultdict(dict)
        self._routes: dict[fx.Node, dict[Strategy, None]] = defaultdict(dict)
        self._parts: dict[Value, set[Part]] = defaultdict(set)
        self._fresh: list[tuple[Value, Part]] = []
        for node, signature in space.signatures.items():
            for cut in own_cuts(signature, space.ranks, order):
                self._add(node, cut)
        while self._fresh:
            self._pass_on(*self._fresh.pop())

    def strategies_of(self, node: fx.Node) -> list[Strategy]:
        signature = self._space.signatures.get(node)
        if signature is not None:
            return [*whole_strategies(signature), *self._cuts[node].values(), *self._routes[node]]
        operands, results = len(operands_of(node)), result_count(node)
        whole = (Strategy(None, (form,) * operands, (form,) * results) for form in (REPLICATED, VARYING))
        return [*whole, *self._routes[node]]

    def _add(self, node: fx.Node, cut: Cut) -> None:
        signature = self._space.signatures[node]
        is_sorted = cut.order not in (None, BALANCED)
        allowed = can_carry(signature, cut) if is_sorted else self._may_cut(node, signature, cut)
        if cut in self._cuts[node] or not allowed or not has_fixed_blocks(signature, cut):
            return
        self._cuts[node][cut] = split_strategy(signature, cut)
        self._note_all(node, self._cuts[node][cut])

    def _note_all(self, node: fx.Node, strategy: Strategy) -> None:
        for operand, form in zip(operands_of(node), strategy.operands, strict=True):
            self._note(value_of(operand), form)
        for index, form in enumerate(strategy.results):
            self._note((node, index), form)

    def _note(self, value: Value, form: Form) -> None:
        if isinstance(form, Part) and form not in self._parts[value]:
            self._parts[value].add(form)
            self._fresh.append((value, form))

    def _pass_on(self, value: Value, part: Part) -> None:
        """Let what makes and what reads a value run in such parts too."""
        if part.order in (None, BALANCED):
            self._route(value, part)
        elif part.order is not None and not part.order.standing.is_carried:
            return
        node, index = value
        signatures = self._space.signatures
        ends = [
            (reader, signatures[reader].operands[at])
            for reader, at in self._space.uses.get(value, ())
            if reader in signatures
        ]
        if node in signatures:
            ends.append((node, signatures[node].results[index]))
        for end, dimensions in ends:
            cut = cut_by(signatures[end], dimensions, part)
            if cut is not None:
                self._add(end, cut)

    def _route(self, value: Value, part: Part) -> None:
        """Let each rank sort its part of the ids by itself, if it is ids that these are."""
        for reader, _ in self._space.uses.get(value, ()):
            routing = self._routed.get(reader)
            if routing is not None:
                for node, strategy in routing.strategies(part, self._space.ranks, self._room):
                    self._routes[node][strategy] = None
                    self._note_all(node, strategy)


def result_count(node: fx.Node) -> int:
    """How many tensors a call gives."""
    value = node.meta["val"]
    return len(value) if isinstance(value, (list, tuple)) else 1


def _lying(node: fx.Node, ranks: int) -> list[Form]:
    """Whole, or cut along one dimension that the ranks divide."""
    value = node.meta["val"]
    sizes: Sequence[int] = value.shape if isinstance(value, torch.Tensor) and ranks > 1 else ()
    chunks = [(dim, even_chunk(size, ranks)) for dim, size in enumerate(sizes)]
    return [REPLICATED, *(Part(d, 1, c) for d, c in chunks if c is not None and c * ranks == sizes[d])]
