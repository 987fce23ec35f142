"""cut: leave of a forward program one stage of a pipeline (Huang et al. 2019).

The calls, in order, are shared out among the stages. What a stage reads of those before it, it receives from the one
just before, and what those behind it read of that, it sends on: so each value travels every stretch of the way once.
"""

import bisect
import itertools
from collections.abc import Mapping
from dataclasses import dataclass

from graphopt.cost.balance import balanced
from graphopt.errors import GraphoptError, PassError
from graphopt.ir import InputKind, Level, ParameterLayout, Program, facts_of
from graphopt.nearest import nearest
from graphopt.passes.base import Pass, PassContext
from graphopt.passes.crossing import Row
from graphopt.passes.stage import keep_stage
from graphopt.sizes import format_size

_STATE = 4  # a parameter, its gradient and the two moments of Adam (Kingma and Ba 2015)


@dataclass(frozen=True)
class CutOptions:
    """stages: how many there are; stage: the one to leave, from 0.

    at: paths of modules, joined by ``|``, each the first of a stage; empty for the cut whose slowest stage takes the
        least time, within each stage's memory.
    live: microbatches that each stage holds at most at a time, joined by ``|``; empty for one.
    memory_bytes: that a stage may hold. send_bytes: of a microbatch, that may cross one cut. 0 for any number.
    """

    stages: int = 2
    stage: int = 0
    at: str = ""
    live: str = ""
    memory_bytes: int = 0
    send_bytes: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.stage < self.stages:
            raise PassError(f"cut: there is no stage {self.stage} of {self.stages}; they are 0 to {self.stages - 1}")
        if self.at and len(self.modules) != self.stages - 1:
            raise PassError(
                f"cut: {len(self.modules)} places leave {len(self.modules) + 1} stages, not {self.stages}; name "
                f"{self.stages - 1}"
            )

    @property
    def modules(self) -> list[str]:
        return [path for path in self.at.split("|") if path]

    @property
    def live_counts(self) -> list[int]:
        return [int(count) for count in self.live.split("|")] if self.live else [1] * self.stages


class Cut(Pass):
    """Cut where little crosses, so that no stage takes much longer than the others."""

    name = "cut"
    Options = CutOptions
    level = Level.FORWARD
    produces = Level.FORWARD
    requires = frozenset({"canonicalize"})
    conflicts = frozenset({"cut"})

    def run(self, program: Program, context: PassContext) -> bool:
        row = Row(program)
        if context.decided is not None and any(layout.stages for layout in context.decided.values()):
            places = _as_decided(row, context.decided, self.options.stages)
        else:
            places = self._by_modules(row) if self.options.at else self._balanced(row, context)
        for place in places:
            self._require_narrow(row, place)
        ends = [0, *places, len(row.calls)]
        sizes = [int(row.crossing_bytes[place]) for place in places]
        context.statistics.update(calls="|".join(str(b - a) for a, b in itertools.pairwise(ends)))
        context.statistics.update(crossing="|".join(map(str, sizes)))
        for name, stages in _stages_of_parameters(row, places).items():
            context.layouts[name] = context.layouts[name].on_stages(stages)
        stage = self.options.stage
        keep_stage(program, row, ends[stage], ends[stage + 1], context.fake_mode)
        return True

    def _balanced(self, row: Row, context: PassContext) -> list[int]:
        """The places before which the stages but the first begin."""
        state = {}
        for role, node in row.program.nodes_of(InputKind.PARAMETER):
            layout = context.layouts[role.name]
            shards = 1 if layout.is_whole else layout.ranks
            state[role.name] = _STATE * node.meta["val"].numel() * layout.dtype.itemsize // shards
        at, lines = row.lines(context.hardware, state)
        try:
            chosen = balanced(lines, self.options.live_counts, self.options.memory_bytes or None)
        except GraphoptError as error:
            raise PassError(f"cut: {error}") from error
        return [int(at[line]) for line in chosen]

    def _by_modules(self, row: Row) -> list[int]:
        """The places of the first calls of the named modules."""
        paths = [facts_of(node).module for node in row.calls]
        within = {path: _parents(path) for path in set(paths)}
        places = []
        for wanted in self.options.modules:
            found = next((i for i, path in enumerate(paths) if wanted in within[path]), None)
            if found is None:
                known = {part for parts in within.values() for part in parts}
                raise PassError(f"cut: no module {wanted!r} runs; {nearest(wanted, known)}")
            places.append(row.place[row.calls[found]])
        if sorted(set(places)) != places or not places[0]:
            raise PassError(f"cut: the modules {', '.join(self.options.modules)} do not run in this order; sort them")
        self._require_parameters(row, places)
        return places

    def _require_parameters(self, row: Row, places: list[int]) -> None:
        """Raises PassError for a stage that reads no parameter, so that there is nothing to train or to hold there."""
        for stage, (first, behind) in enumerate(itertools.pairwise([0, *places, len(row.calls)])):
            if not any(first <= place < behind for place in row.readers):
                last = next((place for place in row.readers if place >= behind), row.readers[-1])
                end = _described(row, min(behind, len(row.calls) - 1))
                raise PassError(
                    f"cut: stage {stage}, before {end}, has no parameters; the nearest call that reads some is "
                    f"{_described(row, last)}: cut behind it"
                )

    def _require_narrow(self, row: Row, place: int) -> None:
        """Raises PassError where more would cross than may."""
        size, most = int(row.crossing_bytes[place]), self.options.send_bytes
        if size < 0 or (most and size > most):
            lines = [line for line in row.narrow if 0 <= row.crossing_bytes[line] <= (most or size)]
            crossing = "a number" if size < 0 else f"{format_size(size)} of a microbatch"
            where = f"before {_described(row, place)}"
            if not lines:
                raise PassError(f"cut: {where} {crossing} would cross; no line lets at most {format_size(most)} cross")
            best = min(lines, key=lambda line: abs(int(line) - place))
            raise PassError(f"cut: {where} {crossing} would cross; the nearest line is before {_described(row, best)}")


def _stages_of_parameters(row: Row, places: list[int]) -> dict[str, set[int]]:
    """By parameter the stages that read it; the first has what nobody reads."""
    found: dict[str, set[int]] = {}
    for role, node in row.program.nodes_of(InputKind.PARAMETER):
        readers = [user for user in node.users if user in row.place]
        found[role.name] = {bisect.bisect_right(places, row.place[reader]) for reader in readers} or {0}
    return found


def _as_decided(row: Row, decided: Mapping[str, ParameterLayout], stages: int) -> list[int]:
    """Places for stages that have the parameters they have already: of those there are, where least crosses."""
    read = [
        (row.place[user], decided[role.name].stages)
        for role, node in row.program.nodes_of(InputKind.PARAMETER)
        for user in node.users
        if user in row.place
    ]
    places: list[int] = []
    for stage in range(1, stages):
        first = max([*places, *(place for place, its in read if max(its) < stage)], default=0) + 1
        last = min([place for place, its in read if min(its) >= stage], default=len(row.calls) - 1)
        places.append(row.narrowest(first, last))
    return places


def _parents(path: str) -> list[str]:
    """A module's path and those of the modules that it lies in."""
    parts = path.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]


def _described(row: Row, place: int) -> str:
    node = row.calls[place]
    return f"{node.name} of {facts_of(node).module or 'the model'}"
