"""Runs a program on all ranks of a mesh in one process, node by node: no process group, and every value can be seen."""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx

from graphopt._torch import TorchDispatchMode
from graphopt.ir import Effect, Program, effect_of
from graphopt.ir.collectives import WAIT, collective_of, sources_of
from graphopt.ir.effects import draws
from graphopt.ir.ops import all_reduce

Values = list[Any]  # one for each rank


class SeededDraws(TorchDispatchMode):
    """The n-th random operation of a rank draws the same numbers in every program, and in eager."""

    def __init__(self, rank: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._rank = rank
        self._draws = itertools.count()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if draws(function, args, kwargs or {}):
            self.seed()
        return function(*args, **(kwargs or {}))

    def seed(self) -> None:
        """Make ready for the next random operation."""
        torch.manual_seed(1_000_003 * (self._rank + 1) + next(self._draws))


class Simulation:
    """All ranks of one program. mesh: axis name -> ranks, laid out with the first axis varying slowest."""

    def __init__(self, program: Program, mesh: Mapping[str, int]) -> None:
        self._program = program
        self._mesh = dict(mesh)
        self._places = list(itertools.product(*(range(size) for size in mesh.values())))

    @property
    def ranks(self) -> int:
        return len(self._places)

    def run(self, inputs: list[Values]) -> Iterator[tuple[fx.Node, Values]]:
        """Every call in order, with its value on each rank; inputs: for each placeholder, its value on each rank."""
        values: dict[fx.Node, Values] = dict(zip(self._program.placeholders, inputs, strict=True))
        draw = [SeededDraws(rank) for rank in range(self.ranks)]
        for node in self._program.graph.nodes:
            if node.op == "call_function":
                values[node] = self._call(node, values, draw)
                yield node, values[node]

    def _call(self, node: fx.Node, values: Mapping[fx.Node, Values], draw: list[SeededDraws]) -> Values:
        if collective_of(node) is not None:
            return self._exchanged(node, [values[source] for source in sources_of(node)])
        if node.target is all_reduce:
            return self._reduced(values[node.all_input_nodes[0]], str(node.args[1]))
        if node.target is WAIT:
            return values[node.all_input_nodes[0]]
        results = []
        for rank in range(self.ranks):
            if effect_of(node) is Effect.RANDOM:
                draw[rank].seed()
            own = {source: values[source][rank] for source in node.all_input_nodes}
            args, kwargs = fx.map_arg((node.args, node.kwargs), own.__getitem__)
            results.append(node.target(*args, **kwargs))  # type: ignore[operator]
        return results

    def _exchanged(self, node: fx.Node, sources: list[Values]) -> Values:
        """What a collective gives on each rank: a tensor, or a list if it was launched for several."""
        collective = collective_of(node)
        assert collective is not None
        if collective.kind == "all-gather":
            given = [self._gathered(source, collective.axis) for source in sources]
        else:
            given = [self._reduced(source, collective.axis) for source in sources]
        if collective.kind == "reduce-scatter":
            given = [self._scattered(total, collective.axis) for total in given]
        is_list = isinstance(node.args[0], (list, tuple))
        return [[each[rank] for each in given] if is_list else given[0][rank] for rank in range(self.ranks)]

    def _group(self, rank: int, axis: str) -> list[int]:
        """The ranks that differ from `rank` on `axis` alone, in order."""
        position = list(self._mesh).index(axis)
        place = self._places[rank]
        return [
            other
            for other, theirs in enumerate(self._places)
            if theirs[:position] + theirs[position + 1 :] == place[:position] + place[position + 1 :]
        ]

    def _gathered(self, source: Values, axis: str) -> Values:
        return [torch.cat([source[other] for other in self._group(rank, axis)]) for rank in range(self.ranks)]

    def _reduced(self, source: Values, axis: str) -> Values:
        """Sums in the order of the ranks."""
        groups = (self._group(rank, axis) for rank in range(self.ranks))
        return [sum((source[other] for other in rest), source[first].clone()) for first, *rest in groups]

    def _scattered(self, total: Values, axis: str) -> Values:
        parts = []
        for rank in range(self.ranks):
            group = self._group(rank, axis)
            parts.append(total[rank].chunk(len(group))[group.index(rank)].clone())
        return parts
