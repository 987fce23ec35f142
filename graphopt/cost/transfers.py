"""What collectives need beside their results, and when those get their bytes: as the runtime's transports work.

Through a process group several tensors travel packed, in one buffer that leaves and one that arrives. Through shared
memory each rank writes a segment that the others read, and segments are kept for the next exchange.
"""

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Generic

from torch import fx

from graphopt.cost.sizes import ExampleSizes, Size, Sizes
from graphopt.ir import Program
from graphopt.ir.collectives import Collective, collectives_of, sources_of, waits_of
from graphopt.ir.liveness import Interval


@dataclass(frozen=True)
class Life(Generic[Size]):
    """Bytes alive from position `first` of the graph through `last`; None: to the end.

    owner: name of the node that they are allocated by or for.
    """

    owner: str
    category: str
    size: Size
    first: int
    last: int | None


class Transfers(Generic[Size]):
    """The collectives of a program. mesh: axis -> ranks; shared_axes: those that exchange through shared memory.

    storages: what the program's calls allocate. What is decided by sizes is decided by those of the example.
    """

    def __init__(
        self,
        program: Program,
        storages: list[Interval],
        sizes: Sizes[Size],
        mesh: Mapping[str, int],
        shared_axes: frozenset[str],
    ) -> None:
        self._position = {node: index for index, node in enumerate(program.graph.nodes)}
        self._collectives = collectives_of(program)
        self._launched = {collective.node: collective for collective in self._collectives}
        self._sizes = sizes
        self._example = ExampleSizes(mesh)
        self._mesh = mesh
        self._shared_axes = shared_axes
        self._ends: dict[fx.Node, list[int | None]] = {}
        for interval in storages:
            self._ends.setdefault(_giver(interval.owner), []).append(interval.last)

    def life_of(self, interval: Interval) -> tuple[int, int | None]:
        """First and last position of a storage; a collective's result may get it as late as it is waited for."""
        collective = self._launched.get(_giver(interval.owner))
        if collective is None or (self._lands_in_place(collective)):
            return interval.first, interval.last
        shares = collective.kind == "all-reduce"  # its results are views of one tensor
        return self._wait(collective), self._end(collective) if shares else interval.last

    def buffers(self) -> Iterator[Life[Size]]:
        """What collectives hold beside their results."""
        for collective in self._collectives:
            if collective.kind == "all-reduce" and self.is_copied(collective):  # results are padded together
                padding, wait = self._sizes.padding(collective), self._wait(collective)
                yield Life(collective.node.name, "communication", padding, wait, self._end(collective))
            if collective.axis not in self._shared_axes:
                yield from self._packed(collective)
            elif collective.kind == "all-reduce" and self.is_copied(collective):
                launch = self._position[collective.node]
                yield Life(collective.node.name, "communication", self._sizes.whole(collective), launch, launch)
                yield Life(collective.node.name, "communication", self._sizes.padding(collective), launch, launch)
        for axis in self._shared_axes:
            yield from self._segments([c for c in self._collectives if c.axis == axis])

    def _packed(self, collective: Collective) -> Iterator[Life[Size]]:
        """Buffers from launch to wait. One tensor to be summed is itself held on to.

        On the CPU a sum is an exchange all to all, which arrives in as much as left. Of rows that are dispatched it is
        not known how many there are: at most as many as there is room for.
        """
        if self._lands_in_place(collective):
            return
        launch, wait = self._position[collective.node], self._wait(collective)
        if collective.kind in ("dispatch", "combine"):
            for most in (self._sizes.sources(collective), self._sizes.tensor(collective.node)):
                yield Life(collective.node.name, "communication", most, launch, wait)
            return
        name, whole = collective.node.name, self._sizes.whole(collective)
        leaving = self._sizes.sources(collective) if collective.kind == "all-gather" else whole
        yield Life(name, "communication", leaving, launch if self.is_copied(collective) else launch + 1, wait)
        if collective.kind == "all-gather" or sources_of(collective.node)[0].meta["val"].device.type == "cpu":
            yield Life(name, "communication", whole, launch, wait)
        if collective.kind == "all-reduce" and self.is_copied(collective):
            yield Life(name, "communication", self._sizes.padding(collective), launch, launch)
        if collective.kind == "all-reduce":  # what this rank has summed, before all ranks gather it
            yield Life(name, "communication", self._sizes.share(collective), wait, wait)

    def _segments(self, collectives: list[Collective]) -> Iterator[Life[Size]]:
        """Shared segments: each launch takes one that is free or a new one, which is kept.

        When a rank has waited for an exchange, the others have started it, so they are done with all that they wait
        for before they start it: from then on its segments are surely free. Two steps show how many are needed.
        """
        length = len(self._position)
        spans = [
            (self._position[c.node] + step * length, self._wait(c) + step * length, c)
            for step in (0, 1)
            for c in collectives
        ]
        free: list[int] = []
        in_use: list[tuple[int, int]] = []
        for launch, wait, collective in spans:
            surely_free = min((w for start, w, _ in spans if start > wait), default=2 * length)
            free += [size for until, size in in_use if until < launch]
            in_use = [(until, size) for until, size in in_use if until >= launch]
            needs = zip(_segments(self._example, collective), _segments(self._sizes, collective), strict=True)
            for needed, made in needs:
                size = min((size for size in free if needed <= size <= 2 * needed), default=0)
                if size:
                    free.remove(size)
                else:
                    size = needed
                    yield Life(collective.node.name, "segments", made, 0, None)
                in_use.append((surely_free, size))

    def _lands_in_place(self, collective: Collective) -> bool:
        """Through a group, one tensor is gathered, or exchanged, straight into its result."""
        alone = collective.kind in ("all-gather", "all-to-all") and len(sources_of(collective.node)) == 1
        return alone and collective.axis not in self._shared_axes

    def is_copied(self, collective: Collective) -> bool:
        """Whether what leaves is a copy: several tensors are, and one that is padded to equal shares."""
        ranks = self._mesh[collective.axis]
        elements = sum(source.meta["val"].numel() for source in sources_of(collective.node))
        return len(sources_of(collective.node)) > 1 or (collective.kind == "all-reduce" and elements % ranks != 0)

    def _end(self, collective: Collective) -> int | None:
        """Where the last of a collective's results ends; None if one stays."""
        ends = self._ends[collective.node]
        return None if None in ends else max(end for end in ends if end is not None)

    def _wait(self, collective: Collective) -> int:
        """Where a collective is first waited for."""
        return self._position[waits_of(collective.node)[0]]


def _giver(owner: fx.Node) -> fx.Node:
    """The call that gives the list of which `owner` is an item; the node itself if it is none."""
    source = owner.args[0] if owner.target is operator.getitem else owner
    assert isinstance(source, fx.Node)
    return source


def _segments(sizes: Sizes[Size], collective: Collective) -> list[Size]:
    """An all-reduce gathers, in a second segment, what each rank has summed."""
    if collective.kind == "all-reduce":
        return [sizes.whole(collective), sizes.share(collective)]
    return [sizes.sources(collective)]
