"""schedule: launch gathers ahead of their use and wait for reductions behind the next, so that both overlap compute."""

from collections import defaultdict
from dataclasses import dataclass

from torch import fx

from graphopt.errors import PassError
from graphopt.ir import Level, Phase, Program, explain
from graphopt.ir.collectives import sources_of, waits_of
from graphopt.passes.base import Pass, PassContext
from graphopt.passes.bucket import GATHER
from graphopt.passes.reductions import by_level


@dataclass(frozen=True)
class ScheduleOptions:
    """prefetch: buckets in flight beside the one in use; 0 launches each where it is needed."""

    prefetch: int = 1

    def __post_init__(self) -> None:
        if self.prefetch < 0:
            raise PassError(f"schedule: prefetch={self.prefetch} is negative; the nearest valid choice is 0")


class Schedule(Pass):
    """Move launches up and waits down by `prefetch` buckets. Every rank runs the same order."""

    name = "schedule"
    Options = ScheduleOptions
    level = Level.STEP
    produces = Level.STEP
    requires = frozenset({"differentiate"})
    # A second one would move launches that wait elsewhere by now.
    conflicts = frozenset({"schedule", "offload_state", "overlap"})
    keeps_values = True

    def run(self, program: Program, context: PassContext) -> bool:
        before = list(program.graph.nodes)
        launched = awaited = 0
        for phase in Phase:
            launched += self._launch_ahead([n for n in program.compute_nodes(phase) if n.target is GATHER])
        for level in by_level(program.compute_nodes()):
            for line in _by_axis(sorted(level)):
                awaited += self._wait_behind(line, program.output_node)
        context.statistics.update(launched_ahead=launched, waited_behind=awaited)
        return list(program.graph.nodes) != before

    def _launch_ahead(self, gathers: list[fx.Node]) -> int:
        """Launch each gather before the wait for the one `prefetch` places ahead of it."""
        waits = [waits_of(gather)[0] for gather in gathers]
        moved = 0
        for index, gather in enumerate(gathers):
            if index == 0 or self.options.prefetch == 0:
                continue
            anchor = waits[max(0, index - self.options.prefetch)]
            for source in sources_of(gather):
                if source.op == "call_function":
                    anchor.prepend(source)
            anchor.prepend(gather)
            explain(
                gather, self.name, f"launched before {anchor.name}, so that it travels while earlier buckets are in use"
            )
            moved += 1
        return moved

    def _wait_behind(self, reductions: list[fx.Node], end: fx.Node) -> int:
        """Wait for each reduction after the launch of the one `prefetch` places behind it."""
        moved = 0
        for index, reduction in enumerate(reductions):
            if self.options.prefetch == 0:
                continue
            behind = index + self.options.prefetch
            anchor = reductions[behind].next if behind < len(reductions) else end
            for node in _until_output(reduction):
                anchor.prepend(node)
            for wait in waits_of(reduction):
                explain(wait, self.name, f"waited for before {anchor.name}, so that it travels while backward goes on")
            moved += 1
        return moved


def _by_axis(reductions: list[fx.Node]) -> list[list[fx.Node]]:
    """Those of each axis, in order."""
    axes: defaultdict[object, list[fx.Node]] = defaultdict(list)
    for node in reductions:
        axes[node.args[-1]].append(node)
    return list(axes.values())


def _until_output(launched: fx.Node) -> list[fx.Node]:
    """Everything computed from a reduction, in order; it leads to the program's output only."""
    found: dict[fx.Node, None] = {}
    todo = [launched]
    while todo:
        for user in todo.pop().users:
            if user.op != "output" and user not in found:
                found[user] = None
                todo.append(user)
    return sorted(found)
