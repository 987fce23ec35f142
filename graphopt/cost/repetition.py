"""What backward computes again, where, and what that does to the peak of a step and to its time."""

import itertools
import operator
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import fx

from graphopt.ir import Effect, Phase, Program, effect_of
from graphopt.ir.liveness import storage_of
from graphopt.ir.values import byte_size

T = TypeVar("T", bound=Any)  # calls, that compare by their place in the program


def repetitions(
    readers: Iterable[T], reads: Callable[[T], Iterable[T]], repeated: Collection[T]
) -> Iterator[tuple[T, list[T]]]:
    """Each of `readers` with those of `repeated` that must be computed again just before it, in order.

    Each is computed again at most once: where it is first needed, directly or by another that is computed again.
    """
    done: set[T] = set()
    for reader in readers:
        needed: set[T] = set()
        todo = list(reads(reader))
        while todo:
            node = todo.pop()
            if node in repeated and node not in done and node not in needed:
                needed.add(node)
                todo += reads(node)
        done |= needed
        yield reader, sorted(needed)


@dataclass(frozen=True)
class Outcome:
    """What a step becomes. peak_bytes: the most that is alive at a time. seconds: what all its calls take."""

    peak_bytes: int
    seconds: float


class Timeline:
    """A step program, as far as memory and time go: what repeating some of it would do, without rewriting it.

    It follows the rules of `graphopt.cost.memory`, and for a program without collectives gives what that gives. Calls
    are known by their position in the graph; the copy of one, that backward runs, by that plus the number of nodes.
    """

    def __init__(
        self, program: Program, seconds: Callable[[fx.Node], float], held: Callable[[fx.Node], int | None]
    ) -> None:
        """seconds: what a call takes. held: bytes of a result that stay when nothing reads it any more; None: all."""
        nodes = list(program.graph.nodes)
        index = {node: position for position, node in enumerate(nodes)}
        owner = storage_of(program)
        results = [node for node in program.results if node is not None]
        self._index = index
        self._count = len(nodes)
        self._calls = [index[node] for node in program.compute_nodes()]
        self._in_backward = {index[node] for node in program.compute_nodes(Phase.BACKWARD)}
        self._viewed = [i if owner[n] is n else index[n.args[0]] for i, n in enumerate(nodes)]  # type: ignore[index]
        self._reads = [[index[s] for s in node.all_input_nodes] if node.op == "call_function" else [] for node in nodes]
        self._size = [_allocated(node) for node in nodes]
        self._seconds = [seconds(node) if node.op == "call_function" else 0.0 for node in nodes]
        self._list = [index[node.args[0]] if node.target is operator.getitem else i for i, node in enumerate(nodes)]  # type: ignore[index]
        self._held = {index[owner[node]]: held(node) for node in results}
        stay = {index[node] for node in results}
        self._stay = stay | {i for i in self._calls if effect_of(nodes[i]) is not Effect.PURE}
        self._input_bytes = sum(byte_size(node.meta["val"]) for node in program.placeholders)

    def after(self, repeated: Collection[fx.Node]) -> Outcome:
        """What becomes of the step if backward computes `repeated`, pure forward calls, again."""
        again = {self._index[node] for node in repeated}
        reads = [
            [s + self._count if s in again else s for s in sources] if i in self._in_backward else sources
            for i, sources in enumerate(self._reads)
        ]
        reads += [[s + self._count if s in again else s for s in sources] for sources in self._reads]
        order = self._without_dead(self._order(again), reads)
        return Outcome(self._peak(order, reads, again), sum(self._seconds[call % self._count] for call in order))

    def _order(self, again: set[int]) -> list[int]:
        """The calls as they will run."""
        order = [call for call in self._calls if call not in self._in_backward]
        backward = [call for call in self._calls if call in self._in_backward]
        for reader, needed in repetitions(backward, self._reads.__getitem__, again):
            order += [call + self._count for call in needed]
            order.append(reader)
        return order

    def _without_dead(self, order: list[int], reads: list[list[int]]) -> list[int]:
        used = set(self._stay)
        kept = []
        for call in reversed(order):
            if call in used:
                kept.append(call)
                used.update(reads[call])
        return kept[::-1]

    def _peak(self, order: list[int], reads: list[list[int]], again: set[int]) -> int:
        owner = self._owners(again)
        position = {call: at for at, call in enumerate(order)}
        last: dict[int, int] = {}
        for call, at in position.items():
            last[owner[call]] = at
            for source in reads[call]:
                last[owner[source]] = at
        change = [0] * (len(order) + 1)
        for own, at in last.items():
            size = self._size[own % self._count]
            if size:
                copy = own - own % self._count
                change[position[self._list[own - copy] + copy]] += size
                stays = self._held.get(own, 0)
                change[at + 1] -= 0 if stays is None else size - stays
        return self._input_bytes + max(itertools.accumulate(change), default=0)

    def _owners(self, again: set[int]) -> list[int]:
        """For each call and each copy, the one that allocated the storage of its value."""
        owner = list(range(2 * self._count))
        for call, viewed in enumerate(self._viewed):
            for own, later in ((call, call in self._in_backward), (call + self._count, True)):
                if call != viewed:
                    owner[own] = owner[viewed + self._count * (later and viewed in again)]
        return owner


def _allocated(node: fx.Node) -> int:
    """Bytes of the tensor that a call gives; none where it gives a list, whose items are storages of their own."""
    value = node.meta.get("val")
    return byte_size(value) if node.op == "call_function" and isinstance(value, torch.Tensor) else 0
