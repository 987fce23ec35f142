"""Ways to run a step, from the fastest to that which needs least memory, by what backward computes again."""

import itertools
from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import fx

from graphopt.cost.cuts import Cut, Value, hull
from graphopt.ir import Phase, Program, facts_of
from graphopt.ir.liveness import storage_of
from graphopt.ir.values import byte_size

Region = list[Value]
_MARKS = 64


class Frontier(Sequence[set[fx.Node]]):
    """Choices of what backward computes again, each more than the one before; the first is nothing.

    A layer of the model is a region, and what lies outside of layers is one. Layers that are alike are cut alike; then
    they turn one by one from one cut to the next, in the order of the time that this takes for each byte, the earliest
    layers first: their values wait longest, and when backward comes to them nearly all others are gone.

    marks: some of the choices, among them those after which the price of a byte rises.
    """

    def __init__(self, program: Program, repeatable: Collection[fx.Node], seconds: Callable[[fx.Node], float]) -> None:
        """repeatable: pure forward calls that may be computed again. seconds: what a call takes."""
        self._regions = _regions(program, repeatable, seconds)
        cuts: dict[Hashable, list[Cut]] = {}
        self._cuts = []
        for region in self._regions:
            kind = _kind(region)
            if kind not in cuts:
                cuts[kind] = hull(region)
            self._cuts.append(cuts[kind])
        steps = [
            (price, region, index)
            for region, kind in enumerate(self._cuts)
            for index, price in enumerate(_prices(kind))
        ]
        steps.sort()
        self._steps = [(region, index) for _, region, index in steps]
        prices = [price for price, _, _ in steps]
        ends = [at for at, price in enumerate(prices, 1) if at == len(prices) or prices[at] != price]
        self.marks = [0, *ends[:: -(-len(ends) // _MARKS)], *ends[-1:]]

    def __len__(self) -> int:
        return len(self._steps) + 1

    def __getitem__(self, choice: Any) -> Any:
        if choice >= len(self):
            raise IndexError(choice)
        last_cut = dict(self._steps[:choice])
        return {
            self._regions[region][place].node
            for region, index in last_cut.items()
            for place in self._cuts[region][index].repeated
        }


def _regions(program: Program, repeatable: Collection[fx.Node], seconds: Callable[[fx.Node], float]) -> list[Region]:
    """The forward calls of each layer, and of none, with what it takes to save them or to compute them again."""
    owner = storage_of(program)
    forward = program.compute_nodes(Phase.FORWARD)
    pinned = {owner[node] for node in forward if node not in repeatable}
    stays = {owner[node] for node in program.results if node is not None}
    regions: defaultdict[str | None, Region] = defaultdict(list)
    for node in forward:
        value = node.meta.get("val")
        is_view = owner[node] is not node
        size = byte_size(value) if isinstance(value, torch.Tensor) and not is_view else None
        may_repeat = node in repeatable if is_view else node not in pinned
        if size is None and not may_repeat:
            size = 0
        regions[facts_of(node).layer].append(
            Value.of(
                node,
                0 if node in stays else size,
                seconds(node) if may_repeat else None,
                any(user.op != "output" and facts_of(user).phase is Phase.BACKWARD for user in node.users),
            )
        )
    return list(regions.values())


def _kind(region: Region) -> Hashable:
    """Equal for regions that can be cut alike."""
    place = {value.node: index for index, value in enumerate(region)}
    return tuple(
        (
            value.bytes,
            value.picoseconds,
            value.is_needed,
            tuple(place[source] for source in value.node.all_input_nodes if source in place),
        )
        for value in region
    )


def _prices(cuts: Sequence[Cut]) -> Iterator[float]:
    """Time for each byte that the step to a cut takes, from the cut before."""
    yield 0.0
    for before, after in itertools.pairwise(cuts):
        yield (after.picoseconds - before.picoseconds) / (before.saved_bytes - after.saved_bytes)
