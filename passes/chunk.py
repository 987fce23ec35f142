"""chunk: run what lies between moves over model axes on a part of the batch at a time (Domino: Wang et al. 2024).

As `split` gives each rank its part of a dimension, this gives each part of the batch its turn. Parts need nothing of
each other until they are joined, so what one moves can travel while another computes: between two moves all of one part
is computed, then all of the next, and `interleave` puts the waits where they belong.

A row of a product is what it was, up to the kernel that is chosen for so many rows. The gradient of a weight becomes a
sum over parts of the batch.
"""

import logging
import operator
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphopt.dimensions.forms import Form, Part
from graphopt.dimensions.signature import operands_of
from graphopt.dimensions.space import Value, is_item, result_count, value_of
from graphopt.dimensions.strategies import Strategy, cut_by, split_strategy
from graphopt.dimensions.table import signature_of
from graphopt.errors import PassError
from graphopt.ir import Effect, InputKind, Level, Phase, Program, annotate, effect_of, explain
from graphopt.ir.moves import ALL_TO_ALL, ENTER, GATHER, LEAVE, MAXIMUM, MOVES, PART, SCATTER_SUM
from graphopt.passes.base import Pass, PassContext, Tier
from graphopt.passes.build import Builder
from graphopt.passes.rewrite import remove_dead
from graphopt.passes.split_rewrite import run_on_part

log = logging.getLogger(__name__)
aten = torch.ops.aten
_TRAVEL_FORWARD = frozenset({LEAVE, GATHER, SCATTER_SUM, ALL_TO_ALL, MAXIMUM})
_TRAVEL = _TRAVEL_FORWARD | {ENTER, PART}


@dataclass(frozen=True)
class ChunkOptions:
    """chunks: equal parts of the batch."""

    chunks: int = 2

    def __post_init__(self) -> None:
        if self.chunks < 2:
            raise PassError(f"chunk: chunks={self.chunks} is too few; the nearest valid choice is 2")


class Chunk(Pass):
    """Run the calls between the first and the last move of activations once for each part of the batch."""

    name = "chunk"
    Options = ChunkOptions
    level = Level.FORWARD
    produces = Level.FORWARD
    requires = frozenset({"split"})
    conflicts = frozenset({"chunk"})
    tier = Tier.REASSOCIATES

    def run(self, program: Program, context: PassContext) -> bool:
        chunks = self.options.chunks
        strategies = _between_moves(program, _along_batch(program, chunks))
        context.statistics.update(chunked=len(strategies), calls=len(program.compute_nodes()))
        if not strategies:
            log.warning("chunk: no move of activations can be cut in %s along the batch; they stay whole", chunks)
            return False
        _Rewrite(program, context, strategies, chunks).run()
        return True


def _along_batch(program: Program, chunks: int) -> dict[fx.Node, Strategy]:
    """The calls that run on parts of the batch, dimension 0 of the batch's tensors, and what they take and give."""
    forms: dict[Value, Part] = {}
    for _, node in program.nodes_of(InputKind.BATCH):
        value = node.meta["val"]
        rows = value.shape[0] if isinstance(value, torch.Tensor) and value.dim() else 0
        if type(rows) is int and rows and rows % chunks == 0:
            forms[node, 0] = Part(0, 1, rows // chunks)
    found: dict[fx.Node, Strategy] = {}
    for node in program.compute_nodes():
        strategy = None if is_item(node) else _strategy(node, forms, chunks)
        if strategy is not None:
            found[node] = strategy
            for index, form in enumerate(strategy.results):
                assert isinstance(form, Part)
                forms[node, index] = form
    return found


def _strategy(node: fx.Node, forms: dict[Value, Part], chunks: int) -> Strategy | None:
    """How a call runs on the parts in which it is given some operand; None if it runs whole."""
    signature = signature_of(node) if effect_of(node) is Effect.PURE or node.target in MOVES else None
    if signature is None:
        return None
    given = [forms.get(value_of(operand)) for operand in operands_of(node)]
    for part, dimensions in zip(given, signature.operands, strict=True):
        cut = None if part is None else cut_by(signature, dimensions, part)
        if cut is None or cut.label in signature.localized:
            continue
        strategy = split_strategy(signature, cut)
        shapes = [operand.meta["val"].shape for operand in operands_of(node)]
        fits = all(_is_even(form, shape, chunks) for form, shape in zip(strategy.operands, shapes, strict=True))
        agrees = all(one is None or one == form for one, form in zip(given, strategy.operands, strict=True))
        if fits and agrees and all(isinstance(form, Part) and form.blocks == 1 for form in strategy.results):
            return strategy
    return None


def _is_even(form: Form, shape: torch.Size, chunks: int) -> bool:
    return not isinstance(form, Part) or (form.blocks == 1 and form.chunk * chunks == shape[form.dim])


def _between_moves(program: Program, strategies: dict[fx.Node, Strategy]) -> dict[fx.Node, Strategy]:
    """Those of calls that lead from a move to a move, the two included."""
    nodes = [node for node in program.compute_nodes() if value_of(node)[0] in strategies]
    between = _reached(nodes, backward=False) & _reached(nodes, backward=True)
    return {node: strategy for node, strategy in strategies.items() if node in between}


def _reached(nodes: list[fx.Node], *, backward: bool) -> set[fx.Node]:
    """Moves, and what is computed from them (backward: what they are computed from), through `nodes` alone."""
    found: set[fx.Node] = set()
    for node in reversed(nodes) if backward else nodes:
        next_to: Iterable[fx.Node] = node.users if backward else node.all_input_nodes
        if node.target in _TRAVEL or not found.isdisjoint(next_to):
            found.add(node)
    return found


class _Rewrite:
    """The program laid out anew: in stages that end with moves, and in each stage one part after the other."""

    def __init__(
        self, program: Program, context: PassContext, strategies: dict[fx.Node, Strategy], chunks: int
    ) -> None:
        self._builder = Builder(program, context, Chunk.name)
        self._program = program
        self._strategies = strategies
        self._chunks = chunks
        self._pieces: defaultdict[Value, list[fx.Node]] = defaultdict(list)
        self._slices: dict[tuple[Value, Form, int], fx.Node] = {}
        self._joined: dict[Value, fx.Node] = {}
        self._shapes = {
            (node, index): tuple(value.shape) for node in strategies for index, value in enumerate(_values(node))
        }

    def run(self) -> None:
        turns = [
            (stage, turn, place, node)
            for place, (node, stage) in enumerate(self._stages().items())
            for turn in (range(self._chunks) if node in self._strategies else [-1])
        ]
        for _, turn, _, node in sorted(turns, key=lambda each: each[:3]):
            if node in self._strategies:
                self._run_piece(node, turn)
            else:
                self._run_whole(node)
        results = [None if node is None else self._whole(node) for node in self._program.results]
        self._program.set_results(results, self._program.outputs)
        for node in reversed(list(self._strategies)):
            for replaced in [*node.users, node]:
                self._program.graph.erase_node(replaced)
        remove_dead(self._program)

    def _stages(self) -> dict[fx.Node, int]:
        """The stage of each call: behind the moves whose results it needs, and behind the parts that it joins.

        A whole call stays behind those that stood before it, so that random numbers are drawn in the same order.
        """
        stages: dict[fx.Node, int] = {}
        latest = 0
        for node in self._program.compute_nodes():
            if is_item(node) and node.args[0] in self._strategies:
                continue
            sources = {value_of(source)[0] for source in node.all_input_nodes}
            calls = [source for source in sources if source in stages]
            if node in self._strategies:
                found = [stages[call] + (call in self._strategies and call.target in _TRAVEL_FORWARD) for call in calls]
            else:
                found = [latest, *(stages[call] + (call in self._strategies) for call in calls)]
            stages[node] = max(found, default=0)
            latest = max(latest, stages[node])
        return stages

    def _run_piece(self, node: fx.Node, turn: int) -> None:
        strategy = self._strategies[node]
        operands = [
            self._piece(operand, form, turn) for operand, form in zip(operands_of(node), strategy.operands, strict=True)
        ]
        shapes = [_shape_of_part(self._shapes[node, i], form) for i, form in enumerate(strategy.results)]
        with self._builder.before(self._program.output_node):
            piece = self._program.graph.node_copy(node)
            run_on_part(self._builder, piece, operands, shapes)
            annotate(piece, origin=node.name, made_by=Chunk.name)
            explain(piece, Chunk.name, f"part {turn + 1} of {self._chunks} of the batch, for its moves to travel alone")
        is_one = isinstance(piece.meta["val"], torch.Tensor)
        for index in range(result_count(node)):
            result = piece if is_one else self._call(operator.getitem, piece, index, like=piece)
            self._pieces[node, index].append(result)

    def _run_whole(self, node: fx.Node) -> None:
        for source in node.all_input_nodes:
            node.replace_input_with(source, self._whole(source))
        self._program.output_node.prepend(node)

    def _piece(self, operand: fx.Node, form: Form, turn: int) -> fx.Node:
        """What the call whose turn it is takes of an operand: its part, or all."""
        value = value_of(operand)
        if not isinstance(form, Part):
            return self._whole(operand)
        if value not in self._pieces:
            if (value, form, turn) not in self._slices:
                start = turn * form.chunk
                self._slices[value, form, turn] = self._call(
                    aten.slice.Tensor, operand, form.dim, start, start + form.chunk, like=operand
                )
            return self._slices[value, form, turn]
        return self._pieces[value][turn]

    def _whole(self, source: fx.Node) -> fx.Node:
        """All of a value, joined if it is made in parts."""
        value = value_of(source)
        if value not in self._pieces:
            return source
        if value not in self._joined:
            form = self._strategies[value[0]].results[value[1]]
            assert isinstance(form, Part)
            pieces = self._pieces[value]
            self._joined[value] = self._call(aten.cat.default, pieces, form.dim, like=pieces[0])
        return self._joined[value]

    def _call(self, target: Callable[..., Any], *args: Any, like: fx.Node) -> fx.Node:
        with self._builder.before(self._program.output_node):
            return self._builder.call(target, *args, like=like, phase=Phase.FORWARD)


def _values(node: fx.Node) -> Sequence[torch.Tensor]:
    value = node.meta["val"]
    return value if isinstance(value, (list, tuple)) else [value]


def _shape_of_part(shape: tuple[int, ...], form: Form) -> tuple[int, ...]:
    assert isinstance(form, Part)
    return (*shape[: form.dim], form.chunk, *shape[form.dim + 1 :])
