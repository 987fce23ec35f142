"""A drawn example as a Python file that judges it by itself: what is printed is what ran."""

import inspect
from collections.abc import Callable
from typing import Any

from hypothesis import note, reject

from graphopt import Plan
from tests.support.drawn import judge
from tests.support.drawn.example import Example
from tests.support.drawn.judge import Results, Subject, judge_passes, judge_training, reference, trained_on_all

REGISTRY = "graphopt.passes:REGISTRY"

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
    subject = runnable(example, registry)
    _printed(example, "judge_passes(subject)", registry, lambda: judge_passes(subject))


def judge_some_steps(example: Example, train: Train | None = None) -> None:
    """`judge_training`; a failure is printed as a script. train: runs it on ranks that are there already."""
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


def _printed(example: Example, judgement: str, registry: str, run: Callable[[], None]) -> None:
    try:
        run()
    except Exception:
        note(script(example, judgement, registry))
        raise
