"""The memory of a step on one rank: what is alive after each node, and of which kind."""

import dataclasses
import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from graphopt.cost.lives import Around, lives_elsewhere, lives_of
from graphopt.cost.sizes import ExampleSizes
from graphopt.cost.transfers import Life
from graphopt.ir import Program

_ALONE = Around()


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank.

    by_category: the most bytes of each category that are alive at one time (parameters, optimizer state, gathered
        parameters, gradients, activations saved for backward, outputs, communication, segments of shared memory,
        buffers, batch, temporaries).
    peak_bytes: the most bytes of all categories together; peak_node: at which node.
    timeline: bytes alive after each call node, in order.
    lives: what is alive from where to where, in positions of the graph's nodes; peak_position: that of the peak.
    elsewhere: the most bytes at one time in places that are not among these (``host``, ``disk``).
    """

    by_category: dict[str, int]
    peak_bytes: int
    peak_node: str
    peak_position: int
    timeline: list[int] = field(repr=False)
    lives: list[Life[int]] = field(repr=False)
    elsewhere: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        found = {"by_category": self.by_category, "peak_bytes": self.peak_bytes, "peak_node": self.peak_node}
        return {**found, "elsewhere": self.elsewhere} if self.elsewhere else found

    def at_peak(self) -> list[Life[int]]:
        """What is alive at the peak, largest first."""
        at = self.peak_position
        alive = [life for life in self.lives if life.first <= at and (life.last is None or life.last >= at)]
        return sorted(alive, key=lambda life: -life.size)

    def steps(self) -> dict[str, list[tuple[int, int]]]:
        """For each category, the positions where its bytes change, with the bytes from there on."""
        change: defaultdict[str, Counter[int]] = defaultdict(Counter)
        for life in self.lives:
            change[life.category][life.first] += life.size
            if life.last is not None:
                change[life.category][life.last + 1] -= life.size
        found = {}
        for category, changes in change.items():
            positions = sorted(position for position, size in changes.items() if size)
            found[category] = list(zip(positions, itertools.accumulate(changes[p] for p in positions), strict=True))
        return found


def memory(
    program: Program,
    mesh: Mapping[str, int],
    shared_axes: frozenset[str] = frozenset(),
    *,
    around: Around = _ALONE,
    allocation_bytes: int = 1,
) -> Memory:
    """Walk a step program: a value lives until its last use; inputs, outputs and resident values until the end.

    mesh: axis name -> number of ranks. shared_axes: those whose ranks exchange through shared memory.
    around: what is in memory beside (optimizer state, gradients that are added to).
    allocation_bytes: what the allocator rounds each storage up to (`Hardware.allocation_bytes`).
    """
    lives = lives_of(program, mesh, shared_axes, ExampleSizes(mesh), around)
    if allocation_bytes > 1:
        lives = [dataclasses.replace(life, size=rounded(life.size, allocation_bytes)) for life in lives]
    starts: defaultdict[int, list[Life[int]]] = defaultdict(list)
    ends: defaultdict[int, list[Life[int]]] = defaultdict(list)
    for life in lives:
        starts[life.first].append(life)
        if life.last is not None:
            ends[life.last].append(life)
    alive: Counter[str] = Counter()
    most: Counter[str] = Counter()
    total, peak, peak_node, peak_position, timeline = 0, 0, "inputs", 0, []
    for index, node in enumerate(program.graph.nodes):
        for life in starts[index]:
            total += life.size
            alive[life.category] += life.size
            most[life.category] = max(most[life.category], alive[life.category])
        if total > peak:
            peak, peak_position = total, index
            peak_node = node.name if node.op == "call_function" else "inputs"
        for life in ends[index]:
            total -= life.size
            alive[life.category] -= life.size
        if node.op == "call_function":
            timeline.append(total)
    categories = {kind: size for kind, size in most.items() if size}
    elsewhere = _most(lives_elsewhere(program, ExampleSizes(mesh)))
    return Memory(categories, peak, peak_node, peak_position, timeline, lives, elsewhere)


def _most(lives: Iterable[Life[int]]) -> dict[str, int]:
    """For each category the most bytes that are alive at one time."""
    change: defaultdict[str, Counter[int]] = defaultdict(Counter)
    for life in lives:
        change[life.category][life.first] += life.size
        if life.last is not None:
            change[life.category][life.last + 1] -= life.size
    return {kind: max(itertools.accumulate(c[at] for at in sorted(c))) for kind, c in change.items()}


def rounded(size: int, multiple: int) -> int:
    """The least multiple that is no smaller."""
    return -(-size // multiple) * multiple
