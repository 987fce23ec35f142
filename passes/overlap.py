"""overlap: launch copies back when they would just arrive in time, and wait for copies out when they will have left.

Times are those of the cost model. What goes over one link follows each other. Out: as soon as possible, so that memory
is free as early as can be. Back: as late as possible (Hu 1961: list scheduling from the end), so that it is not taken
before its time.
"""

import itertools
from collections import defaultdict
from dataclasses import dataclass

from graphopt.cost.duration import compute_seconds, copy_seconds
from graphopt.cost.operations import work_of
from graphopt.errors import PassError
from graphopt.ir import Level, Phase, Program, explain, facts_of
from graphopt.ir.copies import COPIED_OUT, COPY_IN, Copy, copies_of
from graphopt.passes.base import Pass, PassContext


@dataclass(frozen=True)
class OverlapOptions:
    """depth: copies of one link under way at a time at most, where it is slower than what is computed beside."""

    depth: int = 2

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise PassError(f"overlap: depth={self.depth} is too small; the nearest valid choice is 1")


class Overlap(Pass):
    """Move launches and waits of copies to where compute hides them."""

    name = "overlap"
    Options = OverlapOptions
    level = Level.STEP
    produces = Level.STEP
    requires = frozenset({"differentiate"})
    conflicts = frozenset({"overlap"})
    keeps_values = True

    def run(self, program: Program, context: PassContext) -> bool:
        before = list(program.graph.nodes)
        copies = copies_of(program)
        lines: defaultdict[tuple[str, Phase], list[Copy]] = defaultdict(list)
        for copy in copies:
            lines[copy.link, facts_of(copy.launch).phase].append(copy)
        for own in lines.values():
            line = _Line(program, context, own)
            if line.copies[0].is_out:
                line.wait_late(self.options.depth)
            else:
                line.launch_early(self.options.depth)
        context.statistics.update(copies=len(copies))
        return list(program.graph.nodes) != before


class _Line:
    """The copies of one link in one phase; the time at which each call of the program begins if none has to wait."""

    def __init__(self, program: Program, context: PassContext, copies: list[Copy]) -> None:
        self.copies = copies
        self._seconds = [copy_seconds(copy.launch, copy.place, context.hardware) for copy in copies]
        moving = COPIED_OUT if copies[0].is_out else COPY_IN
        calls = program.compute_nodes(facts_of(copies[0].launch).phase)
        self._end = calls[-1].next
        self._calls = [node for node in calls if node.target is not moving]
        durations = (compute_seconds(work_of(node), context.hardware) for node in self._calls)
        begins = itertools.accumulate(durations, initial=0.0)
        self._begin = dict(zip([*self._calls, self._end], begins, strict=True))

    def wait_late(self, depth: int) -> None:
        """Wait for each copy where it is complete, and not behind the launch of the one `depth` places later."""
        free = 0.0
        at = 0
        calls = [*self._calls, self._end]
        place = {node: position for position, node in enumerate(calls)}
        for index, copy in enumerate(self.copies):
            free = max(free, self._begin[copy.launch]) + self._seconds[index]
            at = max(at, place[copy.launch] + 1)
            while at < len(calls) - 1 and self._begin[calls[at]] < free:
                at += 1
            behind = index + depth
            bound = place[self.copies[behind].launch] if behind < len(self.copies) else len(calls) - 1
            anchor = calls[min(at, bound)]
            anchor.prepend(copy.wait)
            explain(copy.wait, Overlap.name, f"waited for before {anchor.name}, when it should have left")

    def launch_early(self, depth: int) -> None:
        """Launch each copy where it just arrives in time, and not before the wait for the one `depth` places ahead."""
        moments = self._latest_starts()
        at = 0
        calls = self._calls
        place = {node: position for position, node in enumerate(calls)}
        for index, copy in enumerate(self.copies):
            while at + 1 < len(calls) and self._begin[calls[at + 1]] <= moments[index]:
                at += 1
            ahead = place[self.copies[index - depth].wait] + 1 if index >= depth else 0
            anchor = calls[min(max(at, ahead), place[copy.wait])]
            anchor.prepend(copy.launch)
            explain(copy.launch, Overlap.name, f"launched before {anchor.name}, to be there when it is read")

    def _latest_starts(self) -> list[float]:
        """From the last to the first: each arrives when it is read, or when the link must be free for the next."""
        starts = []
        free = float("inf")
        for copy, seconds in zip(reversed(self.copies), reversed(self._seconds), strict=True):
            free = min(free, self._begin[copy.wait]) - seconds
            starts.append(free)
        return starts[::-1]
