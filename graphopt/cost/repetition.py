"""What backward computes again, where, and what that does to the peak of a step and to its time."""

import itertools
import operator
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import fx

from graphopt.cost.lives import inputs_of_step
from graphopt.cost.sizes import ExampleSizes
from graphopt.ir import Effect, OutputKind, Phase, Program, effect_of
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

    def beats(self, other: "Outcome") -> bool:
        """Whether it is as good in both."""
        return self.peak_bytes <= other.peak_bytes and self.seconds <= other.seconds


class Timeline:
    """A step program, as far as memory and time go: what repeating some of it would do, without rewriting it.

    It follows the rules of `graphopt.cost.lives`, and for a program without collectives gives what they give. Calls are
    known by their position in the graph; the copy of one, that backward runs, by that plus the number of nodes.
    """

    def __init__(
        self, program: Program, seconds: Callable[[fx.Node], float], held: Callable[[fx.Node], int | None]
    ) -> None:
        """seconds: what a call takes. held: bytes of a result that stay when nothing reads it any more; None: all."""
        nodes = list(program.graph.nodes)
        index = {node: position for position, node in enumerate(nodes)}
        owner = storage_of(program)
        sizes = ExampleSizes({})
        results = [
            (role, node) for role, node in zip(program.outputs, program.results, strict=True) if node is not None
        ]
        self._index = index
        self._count = len(nodes)
        self._calls = [index[node] for node in program.compute_nodes()]
        self._in_backward = {index[node] for node in program.compute_nodes(Phase.BACKWARD)}
        self._viewed = [i if owner[n] is n else index[n.args[0]] for i, n in enumerate(nodes)]  # type: ignore[index]
        self._reads = [[index[s] for s in node.all_input_nodes] if node.op == "call_function" else [] for node in nodes]
        self._size = [sizes.storage(node) if _is_tensor(node) else 0 for node in nodes]
        self._seconds = [seconds(node) if node.op == "call_function" else 0.0 for node in nodes]
        self._list = [index[node.args[0]] if node.target is operator.getitem else i for i, node in enumerate(nodes)]  # type: ignore[index]
        self._lists = {
            i: byte_size(n.meta["val"])
            for i, n in enumerate(nodes)
            if isinstance(n.meta.get("val"), (list, tuple)) and owner[n] is n
        }
        self._held = {index[owner[n]]: held(n) for role, n in results if role.kind is not OutputKind.BUFFER}
        self._new_buffers = {index[owner[n]] for role, n in results if role.kind is OutputKind.BUFFER} - set(self._held)
        stay = {index[node] for _, node in results}
        self._stay = stay | {i for i in self._calls if effect_of(nodes[i]) is not Effect.PURE}
        inputs = list(inputs_of_step(program, sizes))
        self._input_bytes = sum(life.size for life in inputs if life.first == 0)
        self._tangent_bytes = sum(life.size for life in inputs if life.first > 0)

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
        position = {call: at for at, call in enumerate(order)}
        turn = next(
            (at for at, call in enumerate(order) if call >= self._count or call in self._in_backward), len(order)
        )
        last = self._last_uses(order, reads, self._owners(again))
        change = [0] * (len(order) + 1)
        change[turn] += self._tangent_bytes
        unread: dict[int, int] = {}
        for own, at in last.items():
            size, copy = self._size[own % self._count], own - own % self._count
            source = self._list[own - copy] + copy
            if source in position and own - copy in self._lists:
                unread[own] = unread.get(own, 0) + self._lists[own - copy]
            elif size:
                if source != own:  # a list holds its items until the last is taken
                    at = max(at, last[source])
                    unread[source] = unread.get(source, 0) - size
                if own in self._new_buffers:  # copied to the buffers at the end of forward
                    at = max(at, turn - 1)
                change[position[source]] += size
                stays = self._held.get(own, 0)
                change[at + 1] -= 0 if stays is None else size - stays
        for call, size in unread.items():
            change[position[call]] += size
            change[last[call] + 1] -= size
        return self._input_bytes + max(itertools.accumulate(change), default=0)

    def _last_uses(self, order: list[int], reads: list[list[int]], owner: list[int]) -> dict[int, int]:
        """For each storage, and each list of storages, where it is used last."""
        last: dict[int, int] = {}
        for at, call in enumerate(order):
            last[owner[call]] = at
            for source in reads[call]:
                last[owner[source]] = at
        return last

    def _owners(self, again: set[int]) -> list[int]:
        """For each call and each copy, the one that allocated the storage of its value."""
        owner = list(range(2 * self._count))
        for call, viewed in enumerate(self._viewed):
            for own, later in ((call, call in self._in_backward), (call + self._count, True)):
                if call != viewed:
                    owner[own] = owner[viewed + self._count * (later and viewed in again)]
        return owner


def _is_tensor(node: fx.Node) -> bool:
    """Whether a call gives a tensor, and not a list, whose items are storages of their own."""
    return node.op == "call_function" and isinstance(node.meta.get("val"), torch.Tensor)
