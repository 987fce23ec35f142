"""Why one node is what and where it is."""

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from graphopt.inspect.drawing import Drawing, of_nodes
from graphopt.inspect.inspection import Inspection
from graphopt.inspect.views.base import View
from graphopt.inspect.views.graph import node_line, node_values


def why(inspection: Inspection, name: str) -> View:
    """The reasons for a node of the last program, and the chain of passes behind it. Raises InspectionError."""
    record = inspection.node(name)
    sentences = inspection.explanations.get(name, [])
    chain = inspection.lineage.chain(name)
    readers = [each for each in inspection.stages[-1].nodes if name in each.inputs]

    def text() -> RenderableType:
        table = Table("pass", "what", "node", title="the passes behind it", title_justify="left")
        for made_by, event, state in reversed(chain):
            table.add_row(made_by, event, Text(str(state), no_wrap=True, overflow="ellipsis"))
        reads = Text(f"reads {', '.join(record.inputs) or 'nothing'}")
        read_by = Text(f"read by {', '.join(each.name for each in readers) or 'nothing'}")
        return Group(node_line(record), *(Text(f"  - {each}") for each in sentences), reads, read_by, table)

    def values() -> dict[str, Any]:
        return {
            **node_values(record),
            "why": sentences,
            "chain": [{"pass": made_by, "event": event, "node": str(state)} for made_by, event, state in chain],
            "readers": [each.name for each in readers],
        }

    def drawing() -> Drawing:
        near = {name, *record.inputs, *(each.name for each in readers)}
        nodes = [each for each in inspection.stages[-1].nodes if each.name in near]
        return of_nodes(f"around {name}", nodes, marked=[name])

    return View(text, values, drawing, f"why={name}")
