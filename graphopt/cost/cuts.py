"""What of a region to save for backward and what to compute again, for every price of a saved byte.

For one price the best choice is a minimum cut (as in PyTorch's min-cut partitioner, with the time of what is computed
again beside the bytes that are saved). All prices together give the lower convex hull of time against bytes, found
from its two ends by recursion (Eisner and Severance, "Mathematical techniques for efficient record segmentation in
large shared databases", 1976).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import networkx as nx
from torch import fx

_FORWARD, _BACKWARD = "available in forward", "needed in backward"
_PICOSECONDS = 1e12  # capacities are whole numbers, so that cuts are exact


@dataclass(frozen=True)
class Value:
    """A call of a region. bytes: what saving it takes; None if it cannot be saved itself (a view, a list).

    picoseconds: what computing it again takes; None if that must not be.
    """

    node: fx.Node
    bytes: int | None
    picoseconds: int | None
    is_needed: bool  # by a call of backward

    @classmethod
    def of(cls, node: fx.Node, size: int | None, seconds: float | None, is_needed: bool) -> "Value":
        """From seconds, which are rounded."""
        return cls(node, size, None if seconds is None else round(seconds * _PICOSECONDS), is_needed)


@dataclass(frozen=True)
class Cut:
    """One choice. repeated: places in the region of the calls to compute again."""

    repeated: frozenset[int]
    picoseconds: int
    saved_bytes: int


def hull(region: Sequence[Value]) -> list[Cut]:
    """The choices that are best for some price, from the fastest to that which saves fewest bytes."""
    most_time = 1 + sum(value.picoseconds or 0 for value in region)
    most_bytes = 1 + sum(value.bytes or 0 for value in region)
    place = {value.node: index for index, value in enumerate(region)}

    def cut(price_of_byte: int, price_of_picosecond: int) -> Cut:
        return _minimum_cut(region, place, price_of_byte, price_of_picosecond)

    fastest, smallest = cut(1, most_bytes), cut(most_time, 1)
    return [fastest, *_between(cut, fastest, smallest)]


def _between(cut: Callable[[int, int], Cut], fast: Cut, small: Cut) -> Iterator[Cut]:
    """The hull behind `fast`, up to `small`."""
    longer, fewer = small.picoseconds - fast.picoseconds, fast.saved_bytes - small.saved_bytes
    if longer <= 0 or fewer <= 0:
        return
    found = cut(longer, fewer)
    if longer * found.saved_bytes + fewer * found.picoseconds < longer * fast.saved_bytes + fewer * fast.picoseconds:
        yield from _between(cut, fast, found)
        yield from _between(cut, found, small)
    else:
        yield small


def _minimum_cut(
    region: Sequence[Value], place: Mapping[fx.Node, int], price_of_byte: int, price_of_picosecond: int
) -> Cut:
    """Each call is two vertices: what it reads, and what it gives. Cutting between them is saving the value; cutting
    the first from what is there anyway is computing it again. An edge without capacity cannot be cut.
    """
    graph = nx.DiGraph()
    graph.add_nodes_from((_FORWARD, _BACKWARD))
    for index, value in enumerate(region):
        reads, gives = (index, "reads"), (index, "gives")
        if value.picoseconds is None:
            graph.add_edge(_FORWARD, reads)
        else:
            graph.add_edge(_FORWARD, reads, capacity=value.picoseconds * price_of_picosecond)
        if value.bytes is None:
            graph.add_edge(reads, gives)
        else:
            graph.add_edge(reads, gives, capacity=value.bytes * price_of_byte)
        for source in value.node.all_input_nodes:
            if source in place:
                graph.add_edge((place[source], "gives"), reads)
        if value.is_needed:
            graph.add_edge(gives, _BACKWARD)
    _, (_, needed) = nx.minimum_cut(graph, _FORWARD, _BACKWARD)
    repeated = frozenset(index for index in range(len(region)) if (index, "reads") in needed)
    saved = (v for i, v in enumerate(region) if i not in repeated and (i, "gives") in needed)
    return Cut(repeated, sum(region[i].picoseconds or 0 for i in repeated), sum(v.bytes or 0 for v in saved))
