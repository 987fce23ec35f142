"""What a rank computes and sends when, after the cost model."""

import json
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from graphopt.cost.chrome_trace import chrome_trace
from graphopt.cost.simulator import Schedule
from graphopt.inspect.drawing import Box, Drawing
from graphopt.inspect.inspection import Inspection
from graphopt.inspect.target import TargetError
from graphopt.inspect.views.base import View
from graphopt.ir import facts_of
from graphopt.sizes import readable_time

_WIDTH, _LONGEST, _TRACED = 100, 10, 8
_SHADES = " ░▒▓█"


def schedule(inspection: Inspection) -> View:
    """Streams, what is on them when, and where computing waits for communication."""

    def text() -> RenderableType:
        found = inspection.schedule
        lanes = Text("\n".join(f"{stream:>8} {_lane(found, stream)}" for stream in found.streams))
        waits = Table("waits for", "seconds", "module", title="where computing waits", title_justify="left")
        for stall in sorted(found.stalls, key=lambda stall: -stall.duration)[:_LONGEST]:
            waits.add_row(str(stall.node.args[0]), readable_time(stall.duration), facts_of(stall.node).module)
        return Group(schedule_table(inspection), lanes, *([waits] if found.stalls else []))

    def values() -> dict[str, Any]:
        found = inspection.schedule
        tasks = [
            {"node": task.node.name, "stream": task.stream, "start": task.start, "seconds": task.duration}
            for task in found.tasks
        ]
        return {**found.to_dict(), "ranks": inspection.ranks, "tasks": tasks}

    return View(text, values, lambda: _critical_path(inspection), "schedule")


def schedule_table(inspection: Inspection) -> Table:
    """Each stream's share of a step, then the whole."""
    found = inspection.schedule
    ranks = f"each of {inspection.ranks} ranks" if inspection.ranks > 1 else "the one rank"
    title = f"a step of {ranks} on {inspection.hardware.name}, after the cost model"
    table = Table("stream", "at work", "of the step", title=title, title_justify="left")
    for stream in found.streams:
        busy = found.busy_seconds(stream)
        table.add_row(stream, readable_time(busy), _share(busy, found))
    table.add_row(
        "waiting for communication", readable_time(found.exposed_seconds), _share(found.exposed_seconds, found)
    )
    table.add_row("a step", readable_time(found.total_seconds), "")
    return table


def _share(seconds: float, found: Schedule) -> str:
    return f"{seconds / found.total_seconds:.0%}" if found.total_seconds else ""


def _lane(found: Schedule, stream: str) -> str:
    """A stream over time: each character as dark as its part of the step is busy."""
    busy = [0.0] * _WIDTH
    width = found.total_seconds / _WIDTH or 1.0
    for task in found.tasks:
        if task.stream == stream:
            for index in range(int(task.start / width), min(int(task.end / width), _WIDTH - 1) + 1):
                busy[index] += max(0.0, min(task.end, (index + 1) * width) - max(task.start, index * width))
    return "".join(_SHADES[min(round(part / width * (len(_SHADES) - 1)), len(_SHADES) - 1)] for part in busy)


def _critical_path(inspection: Inspection) -> Drawing:
    """The tasks that decide how long a step takes; those of one module and stream in one box."""
    picture = Drawing(
        f"critical path of a step of {inspection.title}, {readable_time(inspection.schedule.total_seconds)}"
    )
    last, seconds = None, 0.0
    for task in inspection.schedule.critical_path:
        facts = facts_of(task.node)
        place = (task.stream, facts.phase.value, facts.module)
        if place != last:
            picture.boxes.append(Box(len(picture.boxes), "", task.stream))
            seconds = 0.0
        seconds += task.duration
        label = f"{facts.phase.value} {facts.module}\n{readable_time(seconds)}"
        picture.boxes[-1] = Box(len(picture.boxes) - 1, label, task.stream)
        last = place
    picture.arrows = [(index, index + 1, "") for index in range(len(picture.boxes) - 1)]
    return picture


def write_trace(inspection: Inspection, path: Path) -> None:
    """The schedule of every rank, or of the first eight, in the Trace Event Format. Raises TargetError."""
    ranks = range(min(inspection.ranks, _TRACED))
    try:
        path.write_text(json.dumps(chrome_trace(inspection.schedule, ranks)), encoding="utf-8")
    except OSError as error:
        raise TargetError(f"{path} cannot be written: {error.strerror}") from error
