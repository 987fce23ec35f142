"""Two plans side by side."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from graphopt.inspect.compare import compare as compared
from graphopt.inspect.drawing import Box, Drawing
from graphopt.inspect.inspection import Inspection
from graphopt.inspect.views.base import View

_MOST = 40


def compare(left: Inspection, right: Inspection) -> View:
    """Time, memory and bytes under two plans, and what lies or travels otherwise."""
    found = compared(left, right)

    def text() -> RenderableType:
        table = Table("of a step on one rank", found.left, found.right, "ratio")
        for row in found.rows:
            table.add_row(*row)
        if not found.moved:
            return table
        moved = Table("what", found.left, found.right, title="elsewhere", title_justify="left")
        for elsewhere in found.moved[:_MOST]:
            moved.add_row(*elsewhere)
        rest = len(found.moved) - _MOST
        return Group(table, moved, *([Text(f"and {rest} more")] if rest > 0 else []))

    def drawing() -> Drawing:
        picture = Drawing(f"{left.title} under two plans")
        for side, plan in enumerate((found.left, found.right)):
            rows = "\n".join(f"{row[0]}: {row[1 + side]}" for row in found.rows)
            picture.boxes.append(Box((side, ""), rows, plan))
            picture.boxes += [Box((side, row[0]), f"{row[0]}\n{row[1 + side]}", plan) for row in found.moved]
        picture.arrows = [((0, row[0]), (1, row[0]), "") for row in found.moved]
        return picture

    return View(text, found.to_dict, drawing, "compare", page={"comparison": found.to_dict()})
