"""The whole at a glance: passes, communication, memory, time."""

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from graphopt.inspect.drawing import Box, Drawing, chain
from graphopt.inspect.inspection import Inspection
from graphopt.inspect.views.base import View
from graphopt.inspect.views.schedule import schedule_table
from graphopt.ir.collectives import collectives_of
from graphopt.report import communication_table, kernels_table, passes_table
from graphopt.sizes import readable_size


def summary(inspection: Inspection) -> View:
    """Passes, communication, memory and time of a step."""

    def text() -> RenderableType:
        return Group(*inspection.report.renderables(), schedule_table(inspection))

    def values() -> dict[str, Any]:
        return {**inspection.report.to_dict(), "schedule": inspection.schedule.to_dict()}

    return View(text, values, lambda: _pipeline(inspection), "summary")


def passes(inspection: Inspection) -> View:
    """What each pass did, and how long it took."""

    def text() -> RenderableType:
        table = Table("after", "made", "changed", "moved", "removed", title="nodes", title_justify="left")
        for stage, change in zip(inspection.stages, inspection.changes, strict=True):
            counts = change.counts
            table.add_row(stage.made_by.text, *(str(counts[kind]) for kind in ("made", "changed", "moved", "removed")))
        return Group(passes_table(inspection.report.passes), table)

    def values() -> list[dict[str, Any]]:
        return [
            {**vars(stage.made_by), "nodes": change.counts}
            for stage, change in zip(inspection.stages, inspection.changes, strict=True)
        ]

    return View(text, values, lambda: _pipeline(inspection), "summary")


def communication(inspection: Inspection) -> View:
    """Calls and bytes of each collective in a step."""
    found = inspection.report.communication

    def drawing() -> Drawing:
        boxes = [
            Box(each.node, f"{each.kind} over {each.axis}\n{readable_size(each.whole_bytes)}", each.phase.value)
            for each in collectives_of(inspection.program)
        ]
        return chain(f"collectives of a step of {inspection.title}", boxes)

    return View(lambda: communication_table(found), found.to_dict, drawing, "summary")


def kernels(inspection: Inspection) -> View:
    """Which variant computes each operator that has a kernel, and why."""
    found = inspection.report.kernels

    def drawing() -> Drawing:
        labels = (f"{use.operator}\n{use.calls} calls by {use.variant}" for use in found)
        boxes = [Box(index, label, use.variant) for index, (label, use) in enumerate(zip(labels, found, strict=True))]
        return chain(f"kernels of a step of {inspection.title}", boxes)

    return View(lambda: kernels_table(found), lambda: {"kernels": [use._asdict() for use in found]}, drawing, "summary")


def _pipeline(inspection: Inspection) -> Drawing:
    boxes = []
    for index, (stage, change) in enumerate(zip(inspection.stages, inspection.changes, strict=True)):
        counts = ", ".join(f"{kind} {count}" for kind, count in change.counts.items() if count)
        boxes.append(Box(index, f"{stage.made_by.text}\n{len(stage.nodes)} nodes\n{counts}", stage.level))
    return chain(f"{inspection.title} under {inspection.plan}", boxes)
