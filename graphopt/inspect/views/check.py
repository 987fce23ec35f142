"""The program after each pass beside the model, run in this process."""

from graphopt.inspect.differential import Comparison, Verdict, verdict_table
from graphopt.inspect.drawing import Box, Drawing, chain
from graphopt.inspect.views.base import View


def check(verdict: Verdict) -> View:
    """Which pass, if any, makes the program compute something else, and at which node."""
    values = verdict.to_dict()

    def box(index: int, each: Comparison) -> Box:
        node = f"\nfirst at {verdict.node}" if verdict.node and not each.agrees else ""
        label = f"{each.name}\nworst {each.worst:.1e}, allowed {each.bound:.1e}{node}"
        return Box(index, label, marked=not each.agrees)

    def drawing() -> Drawing:
        boxes = [box(index, each) for index, each in enumerate(verdict.comparisons)]
        return chain("each pass beside the one before, the first beside the model", boxes)

    return View(
        lambda: verdict_table(verdict),
        lambda: values,
        drawing,
        "summary",
        page={"verdict": values},
        failed=verdict.guilty is not None,
    )
