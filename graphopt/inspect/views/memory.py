"""Bytes alive over a step, by category, what makes the peak, and what it is at other sizes."""

import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from graphopt.cost.closed_form import ClosedForm, Peak, closed_form
from graphopt.cost.lives import OPTIMIZERS, Around
from graphopt.cost.memory import Memory
from graphopt.cost.memory import memory as memory_of
from graphopt.errors import GraphoptError
from graphopt.inspect.drawing import Drawing, of_nodes
from graphopt.inspect.inspection import Inspection
from graphopt.inspect.target import TargetError
from graphopt.inspect.views.base import View
from graphopt.nearest import nearest
from graphopt.report import memory_table
from graphopt.sizes import readable_size

_BARS = " ▁▂▃▄▅▆▇█"
_WIDTH, _LARGEST = 100, 15


def memory(inspection: Inspection, sweep: Mapping[str, list[int]] | None = None, optimizer: str | None = None) -> View:
    """The timeline of a rank's memory, and the closed form of its peak.

    sweep: name of a size (``batch``, ``sequence``, ``ranks``) -> values to evaluate it at. optimizer: whose state is
    counted too. Raises GraphoptError for a name of either that is unknown.
    """
    around = _around(optimizer)
    found = memory_with(inspection, optimizer)
    nodes = list(inspection.program.graph.nodes)
    form = functools.cache(
        lambda: closed_form(inspection.program, inspection.plan.mesh, inspection.recorder.layouts, around=around)
    )
    swept = functools.cache(lambda: _swept(form(), sweep) if sweep else [])

    def text() -> RenderableType:
        table = Table("alive at the peak", "category", "bytes", "from", "until", title_justify="left")
        for life in found.at_peak()[:_LARGEST]:
            until = "the end" if life.last is None else nodes[life.last].name
            table.add_row(life.owner, life.category, readable_size(life.size), nodes[life.first].name, until)
        rest = len(found.at_peak()) - _LARGEST
        table.caption = f"and {rest} smaller" if rest > 0 else None
        line = Text(f"{bars(found.timeline, _WIDTH)}\n0 to {readable_size(found.peak_bytes)}, over the calls of a step")
        unit, rounded = inspection.hardware.allocation_bytes, _rounded(inspection, around)
        line.append(f"\n{readable_size(rounded)} in blocks of {unit} bytes, as {inspection.hardware.name} allocates")
        return Group(memory_table(found), line, table, *_formulas(form), *([_sweep_table(swept())] if sweep else []))

    def values() -> dict[str, Any]:
        at_peak = [{**vars(life), "until": nodes[life.last].name if life.last else None} for life in found.at_peak()]
        told = {**found.to_dict(), "timeline": found.timeline, "steps": found.steps(), "at_peak": at_peak}
        told["allocated_bytes"] = _rounded(inspection, around)
        told["closed_form"] = _told(form)
        told["sweep"] = [{**sizes, **_plain(peak)} for sizes, peak in swept()]
        return told

    def drawing() -> Drawing:
        owners = {life.owner for life in found.at_peak()}
        alive = [record for record in inspection.stages[-1].nodes if record.name in owners]
        title = f"alive at the peak of {readable_size(found.peak_bytes)}, at {found.peak_node}"
        return of_nodes(title, alive, marked=[found.peak_node])

    return View(text, values, drawing, "memory")


def memory_with(inspection: Inspection, optimizer: str | None) -> Memory:
    """The memory of a step beside the state of the optimizer of that name. Raises GraphoptError if there is none."""
    return inspection.report.memory if optimizer is None else _memory(inspection, _around(optimizer), 1)


def parse_sweep(given: list[str]) -> dict[str, list[int]]:
    """Values by name from texts such as ``batch=1,2,4``. Raises TargetError for another."""
    found = {}
    for text in given:
        name, equals, values = text.partition("=")
        sizes = [int(value) for value in values.split(",") if value.strip().isdecimal()]
        if not (equals and name and len(sizes) == len(values.split(","))):
            raise TargetError(f"--sweep {text!r} names no sizes; write for instance batch=2,4,8")
        found[name.strip()] = sizes
    return found


def bars(values: list[int], width: int) -> str:
    """A line of at most `width` characters, each as high as the largest value of its part."""
    if not values:
        return ""
    count = min(width, len(values))
    parts = [values[index * len(values) // count : (index + 1) * len(values) // count] for index in range(count)]
    top = max(values) or 1
    return "".join(_BARS[-(-max(part) * (len(_BARS) - 1) // top)] for part in parts)


def _around(optimizer: str | None) -> Around:
    if optimizer is not None and optimizer not in OPTIMIZERS:
        raise GraphoptError(f"there is no optimizer {optimizer!r}; {nearest(optimizer, OPTIMIZERS)}")
    return Around(optimizer=None if optimizer is None else OPTIMIZERS[optimizer])


def _memory(inspection: Inspection, around: Around, allocation_bytes: int) -> Memory:
    return memory_of(inspection.program, inspection.plan.mesh, around=around, allocation_bytes=allocation_bytes)


def _rounded(inspection: Inspection, around: Around) -> int:
    return _memory(inspection, around, inspection.hardware.allocation_bytes).peak_bytes


def _swept(form: ClosedForm, sweep: Mapping[str, list[int]]) -> list[tuple[dict[str, int], Peak | GraphoptError]]:
    """The peak at all combinations of sizes, or why it is not known there."""
    for name in sweep:
        if name not in form.example:
            known = nearest(name, list(form.example)) if form.example else "the plan leaves none; add dynamic=batch"
            raise GraphoptError(f"no size of the program is called {name!r}; {known}")
    rows: list[tuple[dict[str, int], Peak | GraphoptError]] = []
    for values in itertools.product(*sweep.values()):
        sizes = dict(zip(sweep, values, strict=True))
        try:
            rows.append((sizes, form.at(**sizes)))
        except GraphoptError as error:
            rows.append((sizes, error))
    return rows


def _plain(peak: Peak | GraphoptError) -> dict[str, Any]:
    if isinstance(peak, GraphoptError):
        return {"unknown": str(peak)}
    return {"peak_bytes": peak.peak_bytes, "by_category": peak.by_category}


def _told(formed: Callable[[], ClosedForm]) -> dict[str, Any]:
    try:
        return formed().to_dict()
    except GraphoptError as error:
        return {"unknown": str(error)}


def _formulas(formed: Callable[[], ClosedForm]) -> list[RenderableType]:
    """The closed form by category, then the sums of which the peak is the largest; or why there is none."""
    try:
        form = formed()
    except GraphoptError as error:
        return [Text(f"no closed form: {error}")]
    if not form.example:
        return []
    by_category = Table("memory", "at most, in bytes", title="closed form", title_justify="left")
    for category, size in form.by_category.items():
        by_category.add_row(category, str(size))
    peak = Table("at", "bytes alive", title="the peak is the largest of", title_justify="left")
    for candidate in form.candidates:
        peak.add_row(candidate.node, str(candidate.bytes))
    return [by_category, peak]


def _sweep_table(rows: list[tuple[dict[str, int], Peak | GraphoptError]]) -> Table:
    """A row for each combination of sizes; below, why some are not known."""
    known = [peak.by_category for _, peak in rows if isinstance(peak, Peak)]
    categories = list(dict.fromkeys(category for each in known for category in each))
    reasons = dict.fromkeys(str(peak) for _, peak in rows if isinstance(peak, GraphoptError))
    table = Table(*rows[0][0], "peak", *categories, title="sweep", title_justify="left", caption_justify="left")
    for sizes, peak in rows:
        parts = ["not known"]
        if isinstance(peak, Peak):
            sizes_of = (peak.peak_bytes, *(peak.by_category.get(category, 0) for category in categories))
            parts = [readable_size(size) for size in sizes_of]
        table.add_row(*map(str, sizes.values()), *parts)
    table.caption = "\n".join(reasons) or None
    return table
