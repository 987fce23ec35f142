"""What backward computes again, where, and what that does to the peak of a step and to its time."""

import operator
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from graphopt.cost.lives import inputs_of_step
from graphopt.cost.sizes import ExampleSizes
from graphopt.ir import Effect, OutputKind, Phase, Program, effect_of, facts_of
from graphopt.ir.liveness import storage_of
from graphopt.ir.values import byte_size

T = TypeVar("T", bound=Any)  # calls, that compare by their place in the program
Integers = NDArray[np.int64]
Flags = NDArray[np.bool_]
_NEVER = -1


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
        self._index = {node: position for position, node in enumerate(nodes)}
        self._count = len(nodes)
        self._seconds = np.array([seconds(node) if node.op == "call_function" else 0.0 for node in nodes] * 2)
        self._read_calls(program)
        self._read_storages(program, held)

    def _read_calls(self, program: Program) -> None:
        """Which calls run, in which order, and what they read."""
        index, count = self._index, self._count
        results = {node for node in program.results if node is not None}
        calls = program.compute_nodes(Phase.FORWARD) + program.compute_nodes(Phase.BACKWARD)
        stay = [node for node in calls if node in results or effect_of(node) is not Effect.PURE]
        alive = _reached(stay)
        calls = [node for node in calls if node in alive]
        self._stay = {index[node] for node in stay}
        self._moment = np.full(2 * count, _NEVER)
        self._moment[[index[node] for node in calls]] = np.arange(1, len(calls) + 1) * (count + 1)
        in_backward = [facts_of(node).phase is Phase.BACKWARD for node in index]
        self._is_later = np.array(in_backward + [True] * count)
        reads = [(index[node], index[source]) for node in calls for source in node.all_input_nodes]
        self._readers, self._sources = np.array(reads, np.int64).reshape(-1, 2).T
        self._forward_readers: defaultdict[int, list[int]] = defaultdict(list)
        self._first_in_backward: dict[int, int] = {}
        for reader, source in reads:
            if in_backward[reader]:
                self._first_in_backward.setdefault(source, int(self._moment[reader]))
            else:
                self._forward_readers[source].append(reader)

    def _read_storages(self, program: Program, held: Callable[[fx.Node], int | None]) -> None:
        """What calls allocate, and what of it stays."""
        index, nodes = self._index, list(self._index)
        owner = storage_of(program)
        sizes = ExampleSizes({})
        self._viewed = np.array([i if owner[n] is n else index[n.args[0]] for i, n in enumerate(nodes)])  # type: ignore[index]
        taken = [index[n.args[0]] if n.target is operator.getitem else i for i, n in enumerate(nodes)]  # type: ignore[index]
        self._list = np.concatenate([taken, np.array(taken) + self._count])
        self._size = np.array([sizes.storage(node) if _is_tensor(node) else 0 for node in nodes] * 2)
        self._listed = np.array([byte_size(n.meta["val"]) if _is_list(n) and owner[n] is n else 0 for n in nodes] * 2)
        results = [(role.kind, n) for role, n in zip(program.outputs, program.results, strict=True) if n is not None]
        buffers = {index[owner[node]] for kind, node in results if kind is OutputKind.BUFFER}
        others = {index[owner[node]]: held(node) for kind, node in results if kind is not OutputKind.BUFFER}
        self._staying = np.zeros(2 * self._count, np.int64)
        for own, stays in others.items():
            self._staying[own] = self._size[own] if stays is None else stays
        self._is_new_buffer = np.zeros(2 * self._count, bool)
        self._is_new_buffer[list(buffers - others.keys())] = True
        inputs = list(inputs_of_step(program, sizes))
        self._input_bytes = sum(life.size for life in inputs if life.first == 0)
        self._tangent_bytes = sum(life.size for life in inputs if life.first > 0)

    def after(self, repeated: Collection[fx.Node], moved: Collection[fx.Node] = ()) -> Outcome:
        """What becomes of the step if backward computes `repeated`, pure forward calls, again.

        moved: calls whose values leave memory after their last use in forward, and are back for the first in backward.
        """
        again = sorted((self._index[node] for node in repeated), reverse=True)
        moment = self._moments(again)
        running = np.flatnonzero(moment != _NEVER)
        order = running[np.argsort(moment[running])]
        is_again = np.zeros(self._count, bool)
        is_again[again] = True
        away = np.array([self._index[node] for node in moved], np.int64)
        return Outcome(self._peak(order, is_again, away), float(self._seconds[order].sum()))

    def _moments(self, again: Sequence[int]) -> Integers:
        """When each call and each copy runs, if it does. again: readers before what they read.

        A copy runs just before the first call of backward that needs it, directly or for another copy. A call that
        only backward needed, or others such, does not run.
        """
        copies: dict[int, int] = {}
        gone: set[int] = set()
        for call in again:
            readers = self._forward_readers[call]
            needed = [copies[reader] for reader in readers if reader in copies]
            needed += [self._first_in_backward[call]] if call in self._first_in_backward else []
            if needed:
                copies[call] = min(needed)
            if call not in self._stay and gone.issuperset(readers):
                gone.add(call)
        moment = self._moment.copy()
        moment[list(gone)] = _NEVER
        calls = np.array(list(copies), np.int64)
        moment[calls + self._count] = np.array(list(copies.values()), np.int64) - self._count + calls
        return moment

    def _peak(self, order: Integers, is_again: Flags, away: Integers) -> int:
        position = np.full(2 * self._count, _NEVER)
        position[order] = np.arange(len(order))
        turn = int(np.count_nonzero(~self._is_later[order]))
        uses = self._uses(order, position, is_again)
        last = np.full(2 * self._count, _NEVER)
        np.maximum.at(last, *uses)
        change = np.zeros(len(order) + 1, np.int64)
        if len(away):
            self._leave(change, away, uses, turn)
        change[turn] += self._tangent_bytes
        own = np.flatnonzero((last != _NEVER) & (self._size > 0))
        source = self._list[own]
        end = np.maximum(last[own], last[source])  # a list holds its items until the last is taken
        end = np.where(self._is_new_buffer[own], np.maximum(end, turn - 1), end)  # copied at the end of forward
        np.add.at(change, position[source], self._size[own])
        np.subtract.at(change, end + 1, self._size[own] - self._staying[own])
        unread = self._listed.copy()
        is_item = source != own
        np.subtract.at(unread, source[is_item], self._size[own[is_item]])
        lists = np.flatnonzero((self._listed > 0) & (last != _NEVER))
        np.add.at(change, position[lists], unread[lists])
        np.subtract.at(change, last[lists] + 1, unread[lists])
        return self._input_bytes + max(int(change.cumsum().max()), 0)

    def _leave(self, change: Integers, away: Integers, uses: tuple[Integers, Integers], turn: int) -> None:
        """Take what is away off the bytes between its last use in forward and its first in backward."""
        storage, at = uses
        left = np.full(2 * self._count, _NEVER)
        back = np.full(2 * self._count, len(change))
        is_later = at >= turn
        np.maximum.at(left, storage[~is_later], at[~is_later])
        np.minimum.at(back, storage[is_later], at[is_later])
        gone = away[(left[away] != _NEVER) & (back[away] < len(change))]
        np.subtract.at(change, left[gone] + 1, self._size[gone])
        np.add.at(change, back[gone], self._size[gone])

    def _uses(self, order: Integers, position: Integers, is_again: Flags) -> tuple[Integers, Integers]:
        """Each use of a storage, or of a list of storages: which, and where."""
        owner = self._owners(is_again)
        reads_copy = is_again[self._sources]
        read = self._sources + self._count * (reads_copy & self._is_later[self._readers])
        copied = is_again[self._readers]
        read_by_copies = (self._sources + self._count * reads_copy)[copied]
        readers = self._readers
        storages = np.concatenate([owner[order], owner[read], owner[read_by_copies]])
        return storages, np.concatenate([position[order], position[readers], position[readers[copied] + self._count]])

    def _owners(self, is_again: Flags) -> Integers:
        """For each call and each copy, the one that allocated the storage of its value."""
        is_view = self._viewed != np.arange(self._count)
        copy = self._count * is_again[self._viewed]
        own = np.arange(2 * self._count)
        own[: self._count] = self._viewed + copy * (is_view & self._is_later[: self._count])
        own[self._count :][is_view] = (self._viewed + copy)[is_view]
        while not np.array_equal(own, own[own]):  # views of views
            own = own[own]
        return own


def _reached(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """They and all that they are computed from."""
    found = set(nodes)
    todo = list(found)
    while todo:
        for source in todo.pop().all_input_nodes:
            if source not in found:
                found.add(source)
                todo.append(source)
    return found


def _is_tensor(node: fx.Node) -> bool:
    """Whether a call gives a tensor, and not a list, whose items are storages of their own."""
    return node.op == "call_function" and isinstance(node.meta.get("val"), torch.Tensor)


def _is_list(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (list, tuple))
