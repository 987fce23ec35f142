"""More choices for a step that is small enough to try them: what saving one more value, or one less, changes."""

import itertools
import operator
from collections import defaultdict, deque
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch import fx

from graphopt.cost.repetition import Outcome, Timeline
from graphopt.ir import Phase, Program
from graphopt.ir.liveness import storage_of

_LOOKS = 8  # at a choice that was tried already, for each try
Values = frozenset[fx.Node]  # calls that allocate


class Refinement:
    """Ways to run a step, none of them both slower and larger than another, from the fastest to the smallest.

    From given choices it goes on to those that differ in one value or exchange two, as long as that leads to some that
    no other beats (Pareto local search: Paquete, Chiarandini and Stützle, "Pareto local optimum sets in the biobjective
    traveling salesman problem", 2004). The number of tries is bounded; the same steps get the same choices.
    """

    def __init__(self, program: Program, repeatable: Collection[fx.Node], timeline: Timeline) -> None:
        """repeatable: pure forward calls that may be computed again."""
        owner = storage_of(program)
        forward = program.compute_nodes(Phase.FORWARD)
        pinned = {owner[node] for node in forward if node not in repeatable}
        self._timeline = timeline
        self._calls_of: dict[fx.Node, list[fx.Node]] = {}
        for node in forward:
            value = owner[node]
            if value not in pinned and value.op == "call_function" and isinstance(value.meta["val"], torch.Tensor):
                calls = self._calls_of.setdefault(value, [])
                calls.append(node)
                if node is value and node.target is operator.getitem:
                    calls += node.all_input_nodes  # that gives it in a list
        lists: defaultdict[Any, set[fx.Node]] = defaultdict(set)
        for value in self._calls_of:
            lists[value.args[0] if value.target is operator.getitem else value].add(value)
        singles = [frozenset({value}) for value in self._calls_of]
        self._changes = singles + [frozenset(items) for items in lists.values() if len(items) > 1]
        self._front: dict[Values, Outcome] = {}
        self._seen: set[Values] = set()
        self._to_change: deque[Values] = deque()
        self._to_exchange: deque[Values] = deque()

    def choices(self, starts: Iterable[Collection[fx.Node]], tries: int) -> list[set[fx.Node]]:
        """What backward computes again in each choice that was found, in at most `tries` tries beside the starts."""
        for start in starts:
            self._consider(frozenset(value for value in self._calls_of if value in start))
        last = len(self._seen) + tries
        for neighbour in itertools.islice(self._neighbours(), _LOOKS * tries):
            if len(self._seen) < last:
                self._consider(neighbour)
        ordered = sorted(self._front, key=lambda choice: self._front[choice].seconds)
        return [self._calls(choice) for choice in ordered]

    def _neighbours(self) -> Iterator[Values]:
        """Of all choices, also those that come in meanwhile; exchanges, which are many, after everything else."""
        while self._to_change or self._to_exchange:
            if self._to_change:
                choice = self._to_change.popleft()
                if choice in self._front:
                    yield from (choice ^ values for values in self._changes)
                    self._to_exchange.append(choice)
            else:
                choice = self._to_exchange.popleft()
                if choice in self._front:
                    others = [value for value in self._calls_of if value not in choice]
                    yield from ((choice - {one}) | {other} for one, other in itertools.product(choice, others))

    def _consider(self, choice: Values) -> None:
        """Keep a choice that no other beats, and drop those that it beats."""
        if choice in self._seen:
            return
        self._seen.add(choice)
        outcome = self._timeline.after(self._calls(choice))
        if any(other.beats(outcome) for other in self._front.values()):
            return
        self._front = {c: other for c, other in self._front.items() if not outcome.beats(other)}
        self._front[choice] = outcome
        self._to_change.append(choice)

    def _calls(self, choice: Values) -> set[fx.Node]:
        return {node for value in choice for node in self._calls_of[value]}
