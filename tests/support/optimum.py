"""The least recomputation with which a small step fits into a number of bytes, by an exact integer program.

After Jain et al., "Checkmate: breaking the memory wall with optimal tensor rematerialization" (2020): a value may be
computed again before any call of backward, at most once, whenever all that it reads is there.
"""

from collections import defaultdict
from collections.abc import Callable, Collection
from typing import Any

import highspy
from torch import fx

from graphopt.ir import Phase, Program
from graphopt.ir.liveness import intervals, storage_of
from graphopt.ir.values import byte_size

Point = tuple[int, int]  # a place in the graph, and among what is computed again before it (the call itself is last)


def least_recomputation(
    program: Program, repeatable: Collection[fx.Node], seconds: Callable[[fx.Node], float], limit: int
) -> float | None:
    """Seconds of what is computed again; None if nothing fits. Calls give one tensor each."""
    return _Problem(program, repeatable, seconds).solved(limit)


class _Problem:
    def __init__(self, program: Program, repeatable: Collection[fx.Node], seconds: Callable[[fx.Node], float]) -> None:
        self.place = {node: index for index, node in enumerate(program.graph.nodes)}
        self.owner = storage_of(program)
        self.seconds = seconds
        forward = program.compute_nodes(Phase.FORWARD)
        pinned = {self.owner[node] for node in forward if node not in repeatable}
        self.units = [n for n in forward if self.owner[n] is n and n not in pinned and byte_size(n.meta["val"])]
        self.backward = [self.place[node] for node in program.compute_nodes(Phase.BACKWARD)]
        # Reading a view is reading its storage, and what a copy reads are storages too.
        self.reads = {n: {self.owner[s] for s in n.all_input_nodes if s.op == "call_function"} for n in self.place}
        self.readers: defaultdict[fx.Node, list[int]] = defaultdict(list)
        self.natural = {i.owner: (i.first, i.last) for i in intervals(program)}
        self.inputs = sum(byte_size(node.meta["val"]) for node in program.placeholders)
        self.last_forward: defaultdict[fx.Node, int] = defaultdict(int)
        for node in program.compute_nodes():
            for source in {self.owner[s] for s in node.all_input_nodes}:
                if self.place[node] in self.backward:
                    self.readers[source].append(self.place[node])
                else:
                    self.last_forward[source] = self.place[node]
        for node in self.units:
            self.last_forward[node] = max(self.last_forward[node], self.place[node])

    def solved(self, limit: int) -> float | None:
        model = highspy.Highs()
        model.setOptionValue("output_flag", False)
        model.setOptionValue("mip_rel_gap", 1e-6)
        copied = {(at, unit): model.addBinary() for unit in self.units for at in self.backward}
        saved = {unit: model.addBinary() for unit in self.units}
        for unit in self.units:
            model.addConstr(sum(copied[at, unit] for at in self.backward) + saved[unit] <= 1)
        there = {
            (at, unit): saved[unit] + sum(copied[before, unit] for before in self.backward if before <= at)
            for unit in self.units
            for at in self.backward
        }
        for unit in self.units:
            for at in self.readers[unit]:
                model.addConstr(there[at, unit] >= 1)
            for source in self.reads[unit]:
                if source in saved:
                    for at in self.backward:
                        model.addConstr(copied[at, unit] <= there[at, source])
        for point, terms in self._alive(model, copied, saved).items():
            fixed = self.inputs + self._others(point) + sum(size for size, variable in terms if variable is None)
            room = [size * variable for size, variable in terms if variable is not None]
            if fixed > limit:
                return None
            if room:
                model.addConstr(sum(room) <= limit - fixed)
        cost = sum(self.seconds(unit) * 1e6 * copied[at, unit] for at, unit in copied)
        model.minimize(cost)
        if model.getModelStatus() != highspy.HighsModelStatus.kOptimal:
            return None
        return model.getObjectiveValue() / 1e6

    def _points(self) -> list[Point]:
        forward = [(at, len(self.units)) for at in range(self.backward[0])]
        return forward + [(at, sub) for at in self.backward for sub in range(len(self.units) + 1)]

    def _others(self, point: Point) -> int:
        """Bytes of what is neither a unit nor read by one in backward alone: its life is as it was."""
        at, sub = point
        total = 0
        for owner, (first, last) in self.natural.items():
            begins = first if first not in self.backward or sub == len(self.units) else first + 1
            if owner not in self.units and begins <= at and (last is None or at <= last):
                total += byte_size(owner.meta["val"])
        return total

    def _alive(
        self, model: highspy.Highs, copied: dict[Any, Any], saved: dict[Any, Any]
    ) -> dict[Point, list[tuple[int, Any]]]:
        """For each point, the bytes that are there if a variable is one."""
        points = self._points()
        index = {unit: number for number, unit in enumerate(self.units)}
        terms: defaultdict[Point, list[tuple[int, Any]]] = defaultdict(list)
        for unit in self.units:
            size = byte_size(unit.meta["val"])
            copies = [(at, other) for other in self.units if unit in self.reads[other] for at in self.backward]
            direct = max(self.readers[unit], default=-1)
            for point in points:
                if self.place[unit] <= point[0] <= self.last_forward[unit]:
                    terms[point].append((size, None))
                    continue
                if point[0] < self.place[unit]:
                    continue
                original, copy = model.addVariable(0, 1), model.addVariable(0, 1)
                terms[point] += [(size, original), (size, copy)]
                later = [(at, other) for at, other in copies if (at, index[other]) >= point]
                if point <= (direct, len(self.units)):
                    model.addConstr(original >= saved[unit])
                for at, other in later:
                    model.addConstr(original >= saved[unit] + copied[at, other] - 1)
                if point[0] not in self.backward:
                    continue
                begun = sum(copied[at, unit] for at in self.backward if (at, index[unit]) <= point)
                if point <= (direct, len(self.units)):
                    model.addConstr(copy >= begun)
                for at, other in later:
                    model.addConstr(copy >= begun + copied[at, other] - 1)
        return terms
