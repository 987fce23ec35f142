"""Bytes alive over a step, by category, and what makes the peak."""

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from graphopt.inspect.drawing import Drawing, of_nodes
from graphopt.inspect.inspection import Inspection
from graphopt.inspect.views.base import View
from graphopt.report import memory_table
from graphopt.sizes import readable_size

_BARS = " ▁▂▃▄▅▆▇█"
_WIDTH, _LARGEST = 100, 15


def memory(inspection: Inspection) -> View:
    """The timeline of a rank's memory."""
    found = inspection.report.memory
    nodes = list(inspection.program.graph.nodes)

    def text() -> RenderableType:
        table = Table("alive at the peak", "category", "bytes", "from", "until", title_justify="left")
        for life in found.at_peak()[:_LARGEST]:
            until = "the end" if life.last is None else nodes[life.last].name
            table.add_row(life.owner, life.category, readable_size(life.size), nodes[life.first].name, until)
        rest = len(found.at_peak()) - _LARGEST
        table.caption = f"and {rest} smaller" if rest > 0 else None
        line = Text(f"{bars(found.timeline, _WIDTH)}\n0 to {readable_size(found.peak_bytes)}, over the calls of a step")
        return Group(memory_table(found), line, table)

    def values() -> dict[str, Any]:
        at_peak = [{**vars(life), "until": nodes[life.last].name if life.last else None} for life in found.at_peak()]
        return {**found.to_dict(), "timeline": found.timeline, "steps": found.steps(), "at_peak": at_peak}

    def drawing() -> Drawing:
        owners = {life.owner for life in found.at_peak()}
        alive = [record for record in inspection.stages[-1].nodes if record.name in owners]
        title = f"alive at the peak of {readable_size(found.peak_bytes)}, at {found.peak_node}"
        return of_nodes(title, alive, marked=[found.peak_node])

    return View(text, values, drawing, "memory")


def bars(values: list[int], width: int) -> str:
    """A line of at most `width` characters, each as high as the largest value of its part."""
    if not values:
        return ""
    count = min(width, len(values))
    parts = [values[index * len(values) // count : (index + 1) * len(values) // count] for index in range(count)]
    top = max(values) or 1
    return "".join(_BARS[-(-max(part) * (len(_BARS) - 1) // top)] for part in parts)
