"""The stages of a pipeline side by side, and when each runs."""

from collections.abc import Callable
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from graphopt.errors import PlanError
from graphopt.inspect.drawing import Box, Drawing, chain
from graphopt.inspect.inspection import Inspection
from graphopt.inspect.views.base import View
from graphopt.ir import InputKind, OutputKind, Phase, facts_of
from graphopt.ir.values import byte_size
from graphopt.lowering.schedule import planned_schedule
from graphopt.plan import Plan
from graphopt.schedules import StageTimes, Timeline, simulate
from graphopt.sizes import readable_size, readable_time


def stages(plan: Plan, inspect: Callable[[int], Inspection]) -> View:
    """plan: resolved. inspect: compiles a stage. Raises PlanError for a plan that cuts nothing."""
    if plan.pipeline_ranks == 1:
        raise PlanError("the plan cuts the model into no stages; say for instance pp=2")
    schedule = planned_schedule(plan)
    found = [inspect(stage) for stage in range(schedule.stages)]
    rows = [_row(stage, schedule.rank_of_stage[stage], each) for stage, each in enumerate(found)]
    times = [_times(each) for each in found]
    timeline = simulate(planned_schedule(plan, times), times)

    def text() -> RenderableType:
        table = Table(*rows[0], title=f"stages of {found[0].title}", title_justify="left")
        for row in rows:
            table.add_row(*(_readable(name, value) for name, value in row.items()))
        return Group(table, _said(timeline), timeline.to_text())

    def values() -> dict[str, Any]:
        idle = timeline.idle_fraction
        return {
            "stages": rows,
            "schedule": timeline.schedule.name,
            "step_seconds": timeline.makespan,
            "idle_fraction": idle,
        }

    def drawing() -> Drawing:
        texts = [f"stage {row['stage']} on {row['rank']}\n{row['nodes']} nodes" for row in rows]
        boxes = [Box(stage, text, "step") for stage, text in enumerate(texts)]
        return chain(f"stages of {found[0].title}", boxes)

    return View(text, values, drawing, "summary")


def _row(stage: int, rank: int, inspection: Inspection) -> dict[str, Any]:
    program = inspection.program
    kinds = (InputKind.PARAMETER, InputKind.SHARD)
    return {
        "stage": stage,
        "rank": rank,
        "nodes": len(program.compute_nodes()),
        "parameters": sum(byte_size(node.meta["val"]) for _, node in program.nodes_of(*kinds)),
        "sent on": sum(byte_size(node.meta["val"]) for _, node in program.results_of(OutputKind.SENT) if node),
        "forward": _seconds(inspection, Phase.FORWARD),
        "backward": _seconds(inspection, Phase.BACKWARD),
    }


def _seconds(inspection: Inspection, phase: Phase) -> float:
    """What the compute stream is at work in a phase."""
    tasks = inspection.schedule.tasks
    return sum(task.duration for task in tasks if task.stream == "compute" and facts_of(task.node).phase is phase)


def _times(inspection: Inspection) -> StageTimes:
    """Half of backward is taken to be for each of the two gradients."""
    backward = _seconds(inspection, Phase.BACKWARD)
    return StageTimes(_seconds(inspection, Phase.FORWARD), backward / 2, backward / 2)


def _readable(name: str, value: Any) -> str:
    if name in ("forward", "backward"):
        return readable_time(value)
    return readable_size(value) if name in ("parameters", "sent on") else str(value)


def _said(timeline: Timeline) -> str:
    schedule = timeline.schedule
    return (
        f"{schedule.name}: {schedule.microbatches} microbatches in {readable_time(timeline.makespan)}, of which ranks "
        f"are idle {timeline.idle_fraction:.1%}; a line a rank:"
    )
