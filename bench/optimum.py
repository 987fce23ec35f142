"""The least time in which a small step fits into a number of bytes, by an exact integer program.

After Jain et al., "Checkmate: breaking the memory wall with optimal tensor rematerialization" (2020). Forward is a
stage, and so is each call of backward that allocates, with the views that it reads; before each stage of backward any
calls of forward may run again, any number of times in all, and between stages any values may be stored.
"""

import itertools
import math
import operator
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import highspy
import numpy as np
import torch
from torch import fx

from graphopt.cost.memory import Memory, memory
from graphopt.cost.transfers import Life
from graphopt.ir import Effect, Phase, Program, annotate, effect_of
from graphopt.ir.liveness import storage_of
from graphopt.ir.snapshot import copied
from graphopt.ir.values import byte_size
from graphopt.passes.rewrite import remove_dead

_SCALE = 1e6  # microseconds: what the solver's tolerances are made for
_MESH = {"dp": 1}

Variable = int  # its column
Point = tuple[int, fx.Node | None]  # a stage, and the call of forward that runs in it; None: the stage's own calls
Run = tuple[int, fx.Node]  # a stage, and a call of forward that runs in it


@dataclass(frozen=True)
class Optimum:
    """bound_seconds: no way to fit makes the step longer by less. seconds: by how much the best that was found does, a
    program whose memory was measured; None if there was none in the time given.
    """

    seconds: float | None
    bound_seconds: float

    @property
    def is_proven(self) -> bool:
        """Whether none is better than the best that was found."""
        return self.seconds is not None and self.seconds <= self.bound_seconds * (1 + 1e-5) + 1e-12


def optimum(
    program: Program, seconds: Callable[[fx.Node], float], limit: int, patience_seconds: float = 60.0
) -> Optimum | None:
    """Of a step program as differentiation leaves it, on one rank; None if it fits in no way.

    seconds: what a call takes. limit: bytes. patience_seconds: after these the solver stops.
    """
    return _Solver(_Step(program), seconds, limit).solved(patience_seconds)


class _Step:
    """What can run when, what it reads, and how large it is. Units are calls of forward that allocate."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.owner = owner = storage_of(program)
        self.place = {node: index for index, node in enumerate(program.graph.nodes)}
        self.forward = program.compute_nodes(Phase.FORWARD)
        self.stages = [[], *_stages(program.compute_nodes(Phase.BACKWARD), owner)]
        stays = {owner[node] for node in program.results if node is not None}
        self.units = {node: None for node in self.forward if owner[node] is node and node not in stays}
        self.reads = {n: {owner[s] for s in n.all_input_nodes} & self.units.keys() for n in self.place}
        self.readers = {u: [n for n in self.forward if u in self.reads[n]] for u in self.units}
        self.must = _reached(n for n in self.forward if owner[n] in stays or effect_of(n) is not Effect.PURE)
        self.needs = [set[fx.Node]().union(*(self.reads[call] for call in calls)) for calls in self.stages]
        self.last = self._last_needs()
        self._read_sizes()

    def may_repeat(self, unit: fx.Node) -> bool:
        source = unit.args[0] if unit.target is operator.getitem else unit
        return isinstance(source, fx.Node) and effect_of(source) is Effect.PURE

    def other_bytes(self, point: Point) -> int:
        """What is there of all but units."""
        stage, call = point
        if stage == 0:
            assert call is not None
            at = self.place[call]
        else:
            calls = self.stages[stage]
            at = self.place[calls[0] if call is not None else next(c for c in calls if self.owner[c] is c)]
        # Before a stage nothing of its own is there; inputs are all the same.
        before = {node.name for node in self.program.placeholders} if stage and call is not None else None
        return sum(life.size for life in self._others if _is_alive(life, at, before))

    def _last_needs(self) -> dict[fx.Node, int]:
        """The last stage for which each unit can be needed, directly or by others that run again."""
        last = {unit: max((t for t, needs in enumerate(self.needs) if unit in needs), default=0) for unit in self.units}
        for unit in reversed(self.units):
            for source in self.reads[unit]:
                last[source] = max(last[source], last[unit])
        return last

    def _read_sizes(self) -> None:
        names = {unit.name: unit for unit in self.units}
        lives = memory(self.program, _MESH).lives
        self._others = [life for life in lives if life.owner not in names]
        self.size = dict.fromkeys(self.units, 0)
        for life in lives:
            if life.owner in names:
                self.size[names[life.owner]] = life.size
        self.lists = {u for u in self.units if not isinstance(u.meta["val"], torch.Tensor)}
        self.size.update((unit, byte_size(unit.meta["val"])) for unit in self.lists)

    def rewritten(self, runs: Collection[Run]) -> tuple[Program, dict[fx.Node, Point]]:
        """The program in which units run again so, and the point of each of its calls."""
        copy = copied(self.program)
        now = dict(zip(self.program.graph.nodes, copy.graph.nodes, strict=True))  # what gives each value
        points: dict[fx.Node, Point] = {now[call]: (0, call) for call in self.forward}
        for stage, calls in enumerate(self.stages[1:], 1):
            own = [now[call] for call in calls]
            points.update(dict.fromkeys(own, (stage, None)))
            for call in self.forward:  # a view runs again with what it views; if nothing reads it, it is dead
                if (stage, self.owner[call]) in runs:
                    with copy.graph.inserting_before(own[0]):
                        again = copy.graph.node_copy(call, lambda source: now[source])
                    annotate(again, like=call, phase=Phase.BACKWARD, origin=call.name, made_by="optimum")
                    points[again] = (stage, self.owner[call])
                    now[call] = again
            for call, node in zip(calls, own, strict=True):
                node.args, node.kwargs = fx.map_arg((call.args, call.kwargs), lambda source: now[source])
        remove_dead(copy)
        return copy, points


class _Solver:
    """The integer program of one limit."""

    def __init__(self, step: _Step, seconds: Callable[[fx.Node], float], limit: int) -> None:
        self._step, self._seconds, self._limit = step, seconds, limit
        self._model = highspy.Highs()
        for name, value in {"output_flag": False, "threads": 1, "mip_rel_gap": 1e-6}.items():
            self._model.setOptionValue(name, value)
        self._runs: dict[Run, Variable] = {}
        self._stored: dict[Run, Variable] = {}  # when a stage begins
        self._points: set[Point] = set()
        self._add_variables()
        self._add_order()
        for node in step.units:
            self._add_memory((0, node))
        for stage in range(1, len(step.stages)):
            self._add_memory((stage, None))

    def solved(self, patience_seconds: float) -> Optimum | None:
        """Memory is counted while stages' own calls run, and wherever else a solution turns out to need too much."""
        end = time.monotonic() + patience_seconds
        before = _total(self._step.program, self._seconds)
        once = sum(map(self._seconds, self._step.units))
        while True:
            self._model.setOptionValue("time_limit", self._model.getRunTime() + max(end - time.monotonic(), 1.0))
            self._model.run()
            if self._model.getModelStatus() == highspy.HighsModelStatus.kInfeasible:
                return None
            bound = self._model.getInfo().mip_dual_bound / _SCALE - once
            values = self._model.getSolution().col_value
            if self._model.getInfo().primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
                return Optimum(None, bound)
            runs = {run for run, variable in self._runs.items() if run[0] and values[variable] > 0.5}
            program, points = self._step.rewritten(runs)
            above = list(_above(memory(program, _MESH), list(program.graph.nodes), self._limit))
            if not above:
                return Optimum(_total(program, self._seconds) - before, bound)
            added = [self._add_memory(points[node]) for node in above]
            if not any(added) or time.monotonic() > end:
                return Optimum(None, bound)

    def _add_variables(self) -> None:
        step = self._step
        for unit in step.units:
            cost = self._seconds(unit) * _SCALE
            self._runs[0, unit] = self._variable(least=float(unit in step.must), cost=cost, is_integer=True)
            for stage in range(1, step.last[unit] + 1):
                if step.may_repeat(unit):
                    self._runs[stage, unit] = self._variable(cost=cost, is_integer=True)
                if unit not in step.lists:
                    self._stored[stage, unit] = self._variable()

    def _add_order(self) -> None:
        """What runs has what it reads, and what is stored was there."""
        step = self._step
        for (stage, unit), run in self._runs.items():
            for source in step.reads[unit]:
                self._add_implied(run, self._there(stage, source))
        for (stage, unit), stored in self._stored.items():
            self._add_implied(stored, self._there(stage - 1, unit))
            if (stage, unit) in self._runs:
                self._add_row([(stored, 1.0), (self._runs[stage, unit], 1.0)], most=1.0)
        for stage, needs in enumerate(step.needs):
            for unit in needs:
                self._add_row([(variable, 1.0) for variable in self._there(stage, unit)], least=1.0)

    def _there(self, stage: int, unit: fx.Node) -> list[Variable]:
        return [each[stage, unit] for each in (self._runs, self._stored) if (stage, unit) in each]

    def _add_memory(self, point: Point) -> bool:
        """Whether it is new that what is there at a point is within the limit."""
        if point in self._points:
            return False
        self._points.add(point)
        taken = self._step.other_bytes(point)
        terms: list[tuple[Variable, float]] = []
        for unit, size in self._step.size.items():
            alive = self._alive(point, unit) if size else []
            if alive is None:
                taken += size
            elif alive:
                terms.append((self._any_of(alive), size / self._limit))
        if taken > self._limit or sum(share for _, share in terms) > 1 - taken / self._limit:
            self._add_row(terms, most=1 - taken / self._limit)
        return True

    def _alive(self, point: Point, unit: fx.Node) -> list[Variable] | None:
        """The unit is there if one of these is one; None: in any case."""
        step, (stage, call) = self._step, point
        at = step.place[call] if call is not None else len(step.place)
        if unit in step.lists:  # its items are units too
            return [self._runs[point]] if unit is call and point in self._runs else []  # type: ignore[index]
        if step.place[unit] > at:
            return [self._stored[stage, unit]] if (stage, unit) in self._stored else []
        later = [reader for reader in step.readers[unit] if step.place[reader] >= at]
        if unit in step.needs[stage] or (stage == 0 and step.must.intersection(later)):
            return None
        found = [self._runs[stage, n] for n in (*later, *({unit} & {call})) if (stage, n) in self._runs]  # type: ignore[list-item]
        return [*found, self._stored[stage + 1, unit]] if (stage + 1, unit) in self._stored else found

    def _any_of(self, variables: Sequence[Variable]) -> Variable:
        if len(variables) == 1:
            return variables[0]
        one = self._variable()
        for variable in variables:
            self._add_implied(variable, [one])
        return one

    def _variable(self, *, least: float = 0.0, cost: float = 0.0, is_integer: bool = False) -> Variable:
        column = int(self._model.getNumCol())
        self._model.addVar(least, 1.0)
        self._model.changeColCost(column, cost)
        if is_integer:
            self._model.changeColIntegrality(column, highspy.HighsVarType.kInteger)
        return column

    def _add_implied(self, variable: Variable, others: Sequence[Variable]) -> None:
        """It is no more than the sum of the others."""
        self._add_row([(variable, 1.0), *((other, -1.0) for other in others)], most=0.0)

    def _add_row(
        self,
        terms: Sequence[tuple[Variable, float]],
        *,
        least: float = -math.inf,
        most: float = math.inf,
    ) -> None:
        columns = np.array([column for column, _ in terms], np.int32)
        self._model.addRow(least, most, len(terms), columns, np.array([factor for _, factor in terms], np.float64))


def _stages(calls: Sequence[fx.Node], owner: dict[fx.Node, fx.Node]) -> list[list[fx.Node]]:
    """Each call that allocates, with views before it and items of its list after it; the last also has views there."""
    stages: list[list[fx.Node]] = []
    views: list[fx.Node] = []
    for call in calls:
        if call.target is operator.getitem and owner[call] is call:
            stages[-1].append(call)
        elif owner[call] is call:
            stages.append([*views, call])
            views = []
        else:
            views.append(call)
    stages[-1] += views
    return stages


def _reached(calls: Collection[fx.Node] | Iterator[fx.Node]) -> set[fx.Node]:
    """They and all calls that they are computed from."""
    found: set[fx.Node] = set()
    todo = list(calls)
    while todo:
        call = todo.pop()
        if call not in found:
            found.add(call)
            todo += [source for source in call.all_input_nodes if source.op == "call_function"]
    return found


def _is_alive(life: Life[int], at: int, before: set[str] | None) -> bool:
    """before: if not None, whether it is so just before that place; these are there all the same."""
    has_begun = life.first <= at if before is None or life.owner in before else life.first < at
    return has_begun and (life.last is None or at <= life.last)


def _above(found: Memory, nodes: Sequence[fx.Node], limit: int) -> Iterator[fx.Node]:
    """The calls while which more is there."""
    change: defaultdict[int, int] = defaultdict(int)
    for life in found.lives:
        change[life.first] += life.size
        if life.last is not None:
            change[life.last + 1] -= life.size
    totals = itertools.accumulate(change[at] for at in range(len(nodes)))
    return (n for n, total in zip(nodes, totals, strict=True) if total > limit and n.op == "call_function")


def _total(program: Program, seconds: Callable[[fx.Node], float]) -> float:
    return sum(map(seconds, program.compute_nodes()))
