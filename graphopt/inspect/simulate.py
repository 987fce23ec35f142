"""Runs a program on all ranks of a mesh in one process, node by node: no process group, and every value can be seen."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from graphopt._torch import TorchDispatchMode
from graphopt.inspect.exchanges import MOVES, Exchanges, Values
from graphopt.ir import Effect, Program, effect_of
from graphopt.ir.collectives import WAIT, Collective, collective_of, sources_of
from graphopt.ir.context import OF_RANK
from graphopt.ir.effects import draws


class SeededDraws(TorchDispatchMode):
    """The n-th random operation of a rank draws the same numbers in every program, and in eager.

    rank: the place on the data axis; the ranks of other axes draw alike.
    """

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

    def __init__(self, program: Program, mesh: Mapping[str, int], data_axis: str = "dp") -> None:
        self._program = program
        self._data_axis = data_axis
        self._exchanges = Exchanges(mesh)

    @property
    def ranks(self) -> int:
        return self._exchanges.ranks

    def run(self, inputs: list[Values]) -> Iterator[tuple[fx.Node, Values]]:
        """Every call in order, with its value on each rank; inputs: for each placeholder, its value on each rank."""
        values: dict[fx.Node, Values] = dict(zip(self._program.placeholders, inputs, strict=True))
        draw = [SeededDraws(self._exchanges.index(rank, self._data_axis)) for rank in range(self.ranks)]
        for node in self._program.graph.nodes:
            if node.op == "call_function":
                values[node] = self._call(node, values, draw)
                yield node, values[node]

    def _call(self, node: fx.Node, values: Mapping[fx.Node, Values], draw: list[SeededDraws]) -> Values:
        collective = collective_of(node)
        if collective is not None:
            return self._received(node, collective, values)
        if node.target is WAIT:
            return values[node.all_input_nodes[0]]
        if node.target in MOVES:
            value, *arguments = node.args
            return MOVES[node.target](self._exchanges, values[value], *_given(arguments, values))  # type: ignore[index]
        results = []
        for rank, parts in enumerate(self._exchanges.parts):
            if effect_of(node) is Effect.RANDOM:
                draw[rank].seed()
            own = {source: values[source][rank] for source in node.all_input_nodes}
            args, kwargs = fx.map_arg((node.args, node.kwargs), own.__getitem__)
            target: Any = node.target
            function = getattr(parts, target.overloadpacket.__name__) if target in OF_RANK else target
            results.append(function(*args, **kwargs))
        return results

    def _received(self, node: fx.Node, collective: Collective, values: Mapping[fx.Node, Values]) -> Values:
        """What a collective gives on each rank: a tensor, or a list if it was launched for several."""
        more = _given(node.args[1:], values)
        given = [self._exchanges.collective(collective, values[source], *more) for source in sources_of(node)]
        is_list = isinstance(node.args[0], (list, tuple))
        return [[each[rank] for each in given] if is_list else given[0][rank] for rank in range(self.ranks)]


def _given(arguments: Sequence[Any], values: Mapping[fx.Node, Values]) -> Any:
    """Sizes as they are, alike on all ranks; of tensors the values on all of them."""

    def given(argument: fx.Node) -> Any:
        found = values[argument]
        return found if isinstance(found[0], torch.Tensor) else found[0]

    return fx.map_arg(arguments, given)
