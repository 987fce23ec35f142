"""The least sum of cost tables over variables of few values each: exact, by eliminating one variable after another.

Rina Dechter, "Bucket elimination: a unifying framework for reasoning" (1999). The tables that arise have as many
dimensions as the graph of the tables is wide, and graphs of models are narrow: a chain of layers on a few streams.
"""

import heapq
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from graphopt.errors import GraphoptError

V = TypeVar("V", bound=Hashable)
Costs = NDArray[np.float64]
_MOST_ENTRIES = 1 << 26  # half a gigabyte


@dataclass(frozen=True)
class Table(Generic[V]):
    """Costs of each combination of values of `variables`, a dimension each; infinite where it is not allowed."""

    variables: tuple[V, ...]
    costs: Costs


@dataclass(frozen=True)
class Assignment(Generic[V]):
    """values: of each variable, an index. cost: what they cost together."""

    values: Mapping[V, int]
    cost: float


def least_cost(sizes: Mapping[V, int], tables: Sequence[Table[V]]) -> Assignment[V]:
    """The assignment of least cost; of several, always the same. sizes: how many values each variable has.

    Raises GraphoptError if none is allowed, or if the tables hang together too widely.
    """
    elimination = _Elimination(sizes, tables)
    while elimination.left:
        elimination.step()
    cost = elimination.constant
    if not math.isfinite(cost):
        raise GraphoptError("no assignment satisfies all constraints")
    values: dict[V, int] = {}
    for variable, others, best in reversed(elimination.choices):
        values[variable] = int(best[tuple(values[other] for other in others)])
    return Assignment(values, cost)


class _Elimination(Generic[V]):
    """Tables left, and for each variable that is gone its best value given those that were left."""

    def __init__(self, sizes: Mapping[V, int], tables: Sequence[Table[V]]) -> None:
        self._sizes = sizes
        self._rank = {variable: position for position, variable in enumerate(sizes)}
        self._tables: dict[int, Table[V]] = dict(enumerate(tables))
        self._next = len(self._tables)
        self._of: dict[V, set[int]] = {variable: set() for variable in sizes}
        self.constant = 0.0
        self.choices: list[tuple[V, tuple[V, ...], NDArray[np.intp]]] = []
        for key, table in self._tables.items():
            for variable in table.variables:
                self._of[variable].add(key)
        self._queue = [(self._entries(variable), self._rank[variable], variable) for variable in sizes]
        heapq.heapify(self._queue)

    @property
    def left(self) -> bool:
        return bool(self._of)

    def step(self) -> None:
        """Eliminate the variable whose table is smallest."""
        while True:
            entries, rank, variable = heapq.heappop(self._queue)
            if variable not in self._of:
                continue
            now = self._entries(variable)
            if now == entries:
                break
            heapq.heappush(self._queue, (now, rank, variable))
        if entries > _MOST_ENTRIES:
            raise GraphoptError(f"{len(self._of)} choices depend on each other too widely to be made exactly")
        self._eliminate(variable)

    def _eliminate(self, variable: V) -> None:
        mine = sorted(self._of.pop(variable))
        others = tuple(self._neighbours(variable, mine))
        shape = (*others, variable)
        total: Costs = np.zeros([self._sizes[each] for each in shape])
        for key in mine:
            total = total + _spread(self._tables.pop(key), shape)
        best = total.argmin(axis=-1)
        self.choices.append((variable, others, best))
        costs: Costs = np.take_along_axis(total, best[..., None], axis=-1)[..., 0]
        for other in others:
            self._of[other].difference_update(mine)
        if not others:
            self.constant += float(costs)
            return
        self._tables[self._next] = Table(others, costs)
        for other in others:
            self._of[other].add(self._next)
            heapq.heappush(self._queue, (self._entries(other), self._rank[other], other))
        self._next += 1

    def _neighbours(self, variable: V, keys: Sequence[int]) -> list[V]:
        found = dict.fromkeys(each for key in keys for each in self._tables[key].variables if each != variable)
        return sorted(found, key=self._rank.__getitem__)

    def _entries(self, variable: V) -> int:
        """Entries of the table that eliminating a variable makes and looks through."""
        return self._sizes[variable] * math.prod(
            self._sizes[other] for other in self._neighbours(variable, list(self._of[variable]))
        )


def _spread(table: Table[V], shape: Sequence[V]) -> Costs:
    """The costs with the dimensions of `shape`, those of size one where the table does not depend on it."""
    order = [variable for variable in shape if variable in table.variables]
    costs = table.costs.transpose([table.variables.index(variable) for variable in order])
    sizes = iter(costs.shape)
    return costs.reshape([next(sizes) if variable in order else 1 for variable in shape])
