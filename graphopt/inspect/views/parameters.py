"""How each parameter lies over each axis of the mesh."""

import math
import re
from collections.abc import Mapping
from typing import Any

from rich.table import Table

from graphopt.inspect.drawing import Box, Drawing, chain
from graphopt.inspect.inspection import Inspection
from graphopt.inspect.views.base import View
from graphopt.ir import ParameterLayout
from graphopt.sizes import readable_size

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # as a part of a path


def parameters(inspection: Inspection) -> View:
    """Shape, the dimension that each axis cuts, and the bytes on one rank."""

    def values() -> list[dict[str, Any]]:
        return [
            {"name": name, "shape": list(layout.whole_shape), "cut": _cuts(layout), "bytes": _bytes(layout)}
            for name, layout in inspection.recorder.layouts.items()
        ]

    def drawing() -> Drawing:
        boxes = [Box(name, "\n".join([name, *row]), "input") for name, row in _rows(inspection).items()]
        return chain(f"parameters of {inspection.title}", boxes)

    return View(lambda: parameters_table(inspection), values, drawing, "summary")


def parameters_table(inspection: Inspection) -> Table:
    """One row for all parameters that are named alike but for numbers, and lie alike."""
    title = "parameters: the dimension that is cut over each axis, and what one rank keeps of each"
    table = Table("parameter", "shape", *_axes(inspection), "bytes", title=title, title_justify="left")
    for name, row in _rows(inspection).items():
        table.add_row(name, *row)
    return table


def _rows(inspection: Inspection) -> dict[str, tuple[str, ...]]:
    """By name; the numbers in names are left out where that does not tell parameters apart that lie otherwise."""
    layouts = inspection.recorder.layouts
    found = {name: _row(layout, _axes(inspection)) for name, layout in layouts.items()}
    alike: dict[str, set[tuple[str, ...]]] = {}
    for name, row in found.items():
        alike.setdefault(_NUMBER.sub("*", name), set()).add(row)
    folded = {name: _NUMBER.sub("*", name) for name in found}
    return {folded[name] if len(alike[folded[name]]) == 1 else name: row for name, row in found.items()}


def _row(layout: ParameterLayout, axes: list[str]) -> tuple[str, ...]:
    cuts = _cuts(layout)
    over = ("whole" if cuts.get(axis) is None else f"dimension {cuts[axis]}" for axis in axes)
    return (str(list(layout.whole_shape)), *over, readable_size(_bytes(layout)))


def _axes(inspection: Inspection) -> list[str]:
    return [axis for axis, ranks in inspection.plan.mesh.items() if ranks > 1]


def _cuts(layout: ParameterLayout) -> Mapping[str, int]:
    """Axis -> the dimension that it cuts."""
    cuts = {split.axis: split.dim for split in layout.splits}
    return cuts if layout.dim is None else cuts | {layout.axis: layout.dim}


def _bytes(layout: ParameterLayout) -> int:
    """Of what one rank keeps, padding included."""
    return math.prod(layout.shape if layout.is_whole else layout.shard_shape) * layout.dtype.itemsize
