"""The program as Python."""

from typing import Any

from rich.syntax import Syntax

from graphopt.inspect.drawing import Drawing, of_folds
from graphopt.inspect.fold import fold
from graphopt.inspect.inspection import Inspection
from graphopt.inspect.views.base import View


def source(inspection: Inspection, standalone: bool) -> View:
    """Python of the last program: as it is emitted, or as a file that runs on its own."""
    report = inspection.report
    code = inspection.standalone if standalone else report.source

    def values() -> dict[str, Any]:
        return {"path": str(report.source_path), "source": code}

    def drawing() -> Drawing:
        folds = fold(inspection.stages[-1].nodes, inspection.repeats)
        return of_folds(f"{inspection.title} under {inspection.plan}", folds)

    return View(lambda: Syntax(code, "python"), values, drawing, "source")
