"""Ways to run a step within less memory: what is computed again in backward, and what leaves until then."""

import itertools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from torch import fx

from graphopt.ir import Phase, Program
from graphopt.ir.liveness import storage_of

_MARKS = 64


@dataclass(frozen=True)
class Choice:
    """repeated: forward calls that backward computes again. moved: calls whose values leave memory until backward."""

    repeated: Collection[fx.Node]
    moved: Sequence[fx.Node] = ()


class Moving:
    """What could leave memory, and how much of it without anything having to wait.

    Values leave in the order in which they are made: what is made first is away longest. What goes over a link follows
    each other, as `overlap` places it.
    """

    def __init__(
        self,
        program: Program,
        movable: Collection[fx.Node],
        seconds: Callable[[fx.Node], float],
        copy_seconds: Callable[[fx.Node], float],
    ) -> None:
        """movable: calls whose storage may leave. seconds: what a call takes. copy_seconds: what a copy does."""
        self._movable = frozenset(movable)
        self._owner = storage_of(program)
        self._copy_seconds = {node: copy_seconds(node) for node in movable}
        self._backward = program.compute_nodes(Phase.BACKWARD)
        self._made = _moments(program.compute_nodes(Phase.FORWARD), seconds)
        self._read = _moments(self._backward, seconds)
        self._end_of_forward = max(self._made.values(), default=0.0)
        self._end_of_backward = max(self._read.values(), default=0.0)

    def saved(self, repeated: Collection[fx.Node]) -> list[fx.Node]:
        """What of the movable is in memory between forward and backward, in the order in which it is made."""
        found: set[fx.Node] = set()
        todo = [source for node in self._backward for source in node.all_input_nodes]
        again: set[fx.Node] = set()
        for source in todo:
            if source in repeated and source not in again:
                again.add(source)
                todo += source.all_input_nodes
            elif self._owner[source] in self._movable:
                found.add(self._owner[source])
        return sorted(found - set(repeated))

    def hidden(self, values: Sequence[fx.Node]) -> int:
        """How many of `values`, from the first, come and go while others compute."""
        fits = self._leaving(values)
        needed = {value: self._first_read(value) for value in values[:fits]}
        low, high = 0, fits
        while low < high:
            middle = (low + high + 1) // 2
            in_time = sorted(values[:middle], key=needed.__getitem__)
            arrived = itertools.accumulate(self._copy_seconds[value] for value in in_time)
            if all(at <= needed[value] for value, at in zip(in_time, arrived, strict=True)):
                low = middle
            else:
                high = middle - 1
        return low

    def _leaving(self, values: Sequence[fx.Node]) -> int:
        """How many have left when forward ends."""
        free = 0.0
        for count, value in enumerate(values):
            free = max(free, self._made[value]) + self._copy_seconds[value]
            if free > self._end_of_forward:
                return count
        return len(values)

    def _first_read(self, value: fx.Node) -> float:
        """Seconds of backward before anything reads the value, as far as is known before it is rewritten."""
        readers: list[float] = []
        todo = [value]
        seen = {value}
        while todo:
            for user in todo.pop().users:
                if user in self._read:
                    readers.append(self._read[user])
                elif user.op == "call_function" and user not in seen and self._owner[user] is value:
                    seen.add(user)
                    todo.append(user)
        return min(readers, default=self._end_of_backward)


@dataclass(frozen=True)
class _Way:
    """One way to compute again. saved: what could leave then; free: how many of that, from the first, at no cost."""

    repeated: Collection[fx.Node]
    saved: Sequence[fx.Node] = ()
    free: int = 0


class Choices:
    """From the fastest to that which needs least memory: values leave for free, then more and more is computed again.

    In between, as much leaves as is free with what is computed again; in the end more does than is free. marks: some of
    the choices, by which to search.
    """

    def __init__(self, repeated: Sequence[Collection[fx.Node]], marks: Sequence[int], moving: Moving | None) -> None:
        """repeated: ways to compute again, each more than the one before, the first nothing; marks: some of them."""
        self._repeated = repeated
        self._moving = moving
        self._last = len(repeated) - 1
        self._least, self._most = self._way(0), self._way(self._last)
        self._slow = len(self._most.saved) - self._most.free
        slow_from = self._least.free + self._last
        self.marks = [
            *_some(0, self._least.free),
            *(self._least.free + mark for mark in marks if mark),
            *_some(slow_from + 1, slow_from + self._slow),
            *([len(self) - 1] if moving is not None else []),
        ]

    def __len__(self) -> int:
        return self._least.free + self._last + self._slow + (2 if self._moving is not None else 1)

    def __getitem__(self, index: int) -> Choice:
        """Raises IndexError beyond the last."""
        if index >= len(self):
            raise IndexError(index)
        if index <= self._least.free:
            return Choice(self._least.repeated, self._least.saved[:index])
        index -= self._least.free
        if index <= self._last:
            way = self._way(index)
            return Choice(way.repeated, way.saved[: way.free])
        index -= self._last
        if index <= self._slow:
            return Choice(self._most.repeated, self._most.saved[: self._most.free + index])
        return Choice(self._least.repeated, self._least.saved)  # computing a layer again takes memory too

    def _way(self, index: int) -> _Way:
        repeated = self._repeated[index]
        if self._moving is None:
            return _Way(repeated)
        saved = self._moving.saved(repeated)
        return _Way(repeated, saved, self._moving.hidden(saved))


def _moments(calls: Sequence[fx.Node], seconds: Callable[[fx.Node], float]) -> dict[fx.Node, float]:
    """When each call is done, if none has to wait."""
    return dict(zip(calls, itertools.accumulate(map(seconds, calls)), strict=True))


def _some(first: int, last: int) -> list[int]:
    """Numbers from `first` to `last`, both among them, some 64 of them."""
    found = list(range(first, last + 1, max(1, (last + 1 - first) // _MARKS)))
    return found if not found or found[-1] == last else [*found, last]
