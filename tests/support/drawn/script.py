"""A drawn example as a Python file that judges it by itself: what is printed is what ran."""

import dataclasses
import inspect
import re
from collections.abc import Callable
from typing import Any

from hypothesis import note, reject

from graphopt import Plan, Remat
from graphopt.errors import PassError
from graphopt.lowering import lower
from tests.support.drawn import judge
from tests.support.drawn.example import Example
from tests.support.drawn.judge import Results, Subject, judge_passes, judge_training, reference, trained_on_all

REGISTRY = "graphopt.passes:REGISTRY"

_LEAST = re.compile(r"rematerialize: a step within .* is out of reach; the nearest is (\d+) bytes")

Train = Callable[[str, bool, int], list[Results]]  # (source, coarse, ranks) -> what each rank gives


def subject_of(source: str, coarse: bool, registry: str = REGISTRY) -> Subject:
    """What is judged, from the source of an example."""
    names: dict[str, Any] = {"__name__": "drawn"}
    exec(compile(source, "<drawn>", "exec"), names)
    return Subject(names["Model"], names["batch"], Plan.parse(names["PLAN"]), names["RANKS"], registry, coarse)


def script(example: Example, judgement: str, registry: str = REGISTRY) -> str:
    """A file that raises what the example raises. judgement: the call that does, of a `subject`."""
    subject = f"Subject(Model, batch, Plan.parse(PLAN), RANKS, {registry!r}, {example.is_coarse})"
    call = f'if __name__ == "__main__":\n    subject = {subject}\n    {judgement}'
    return "\n\n".join(part.rstrip() + "\n" for part in (example.source(), inspect.getsource(judge), call))


def judge_each_pass(example: Example, registry: str = REGISTRY) -> None:
    """`judge_passes`; a failure is printed as a script."""
    example = _within_reach(example)
    subject = runnable(example, registry)
    _printed(example, "judge_passes(subject)", registry, lambda: judge_passes(subject))


def judge_some_steps(example: Example, train: Train | None = None) -> None:
    """`judge_training`; a failure is printed as a script. train: runs it on ranks that are there already."""
    example = _within_reach(example)
    subject = runnable(example)

    def run() -> None:
        found = train(example.source(), example.is_coarse, example.ranks) if train else trained_on_all(subject)
        judge_training(found, subject)

    _printed(example, "judge_training(trained_on_all(subject), subject)", REGISTRY, run)


def runnable(example: Example, registry: str = REGISTRY) -> Subject:
    """The subject of an example that the uncompiled module can run."""
    subject = subject_of(example.source(), example.is_coarse, registry)
    try:
        reference(subject)
    except (RuntimeError, ValueError, IndexError):  # one row in a batch norm, no rows where there must be some
        reject()
    return subject


def _within_reach(example: Example) -> Example:
    """With the least budget that its first batch allows, where less was drawn."""
    plan = example.plan
    if plan.remat is None and "policy=budget" not in (plan.passes or ""):
        return example
    subject = runnable(example, REGISTRY)
    try:
        lower(subject.build(), (), subject.batch(0, 0), plan.resolve(example.ranks))
    except PassError as error:
        least = _LEAST.search(str(error))
        if least is None:
            raise
        if plan.passes is None:
            return dataclasses.replace(example, plan=dataclasses.replace(plan, remat=Remat(int(least[1]))))
        passes = re.sub(r"\bshare=[\d.]+", f"bytes={least[1]}", plan.passes)
        return dataclasses.replace(example, plan=dataclasses.replace(plan, passes=passes))
    return example


def _printed(example: Example, judgement: str, registry: str, run: Callable[[], None]) -> None:
    try:
        run()
    except Exception as error:
        if _LEAST.search(str(error)):  # a later call is larger; on ranks, it is in the traceback of each
            reject()
        note(script(example, judgement, registry))
        raise
