"""A model compiled under a plan, with all that the views of ``graphopt-inspect`` show; no process group is needed."""

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from graphopt.cost.hardware import Hardware
from graphopt.cost.simulator import Schedule, simulate
from graphopt.emit.split import Halves
from graphopt.emit.standalone import standalone_source
from graphopt.errors import GraphoptError
from graphopt.inspect.provenance import Changes, changes
from graphopt.inspect.recorder import NodeRecord, Recorder, Stage
from graphopt.inspect.repeats import repeated_blocks
from graphopt.inspect.why import Lineage, explanations
from graphopt.ir import Level, Program
from graphopt.lowering import lower
from graphopt.nearest import nearest
from graphopt.plan import Plan
from graphopt.report import Report


class InspectionError(GraphoptError):
    """A pass or node that the compilation does not have; the message names the nearest that it has."""


@dataclass(frozen=True)
class Inspection:
    """One compilation. stages: the program after capture and after each pass; program: after the last of them."""

    title: str
    plan: Plan
    report: Report
    stages: list[Stage]
    program: Program
    hardware: Hardware
    recorder: Recorder
    halves: Halves

    @property
    def ranks(self) -> int:
        """Of the whole mesh."""
        return math.prod(self.plan.mesh.values())

    @functools.cached_property
    def changes(self) -> list[Changes]:
        """For each stage, what it did to the one before."""
        before = [None, *self.stages[:-1]]
        return [changes(one, other) for one, other in zip(before, self.stages, strict=True)]

    @functools.cached_property
    def lineage(self) -> Lineage:
        return Lineage(self.stages, self.changes)

    @functools.cached_property
    def explanations(self) -> dict[str, list[str]]:
        """For each node of the last program, why it is there."""
        return explanations(self.program, self.recorder.layouts)

    @functools.cached_property
    def standalone(self) -> str:
        """The program as one Python file that needs only torch. Raises GraphoptError for a call that torch lacks."""
        layouts, title = self.recorder.layouts, f"{self.title} under {self.plan}"
        return standalone_source(self.halves, self.plan.mesh, layouts, title=title, name=f"{self.title}.py")

    @functools.cached_property
    def schedule(self) -> Schedule:
        """What a rank does when: each rank of the mesh runs the same program."""
        return simulate(self.program, self.plan.mesh, self.hardware)

    @functools.cached_property
    def repeats(self) -> list[list[str]]:
        return repeated_blocks(self.stages[0])

    def stage_after(self, name: str) -> int:
        """The number of the last stage that the pass of this name (or ``capture``) left. Raises InspectionError."""
        names = [stage.name for stage in self.stages]
        if name not in names:
            raise InspectionError(f"the pipeline has no pass {name!r}; {nearest(name, names)}")
        return len(names) - 1 - names[::-1].index(name)

    def last_of(self, level: Level) -> int:
        """The number of the last stage of a level."""
        return max(index for index, stage in enumerate(self.stages) if stage.level == level.value)

    def node(self, name: str) -> NodeRecord:
        """The node of the last program with this name. Raises InspectionError."""
        known = {record.name: record for record in self.stages[-1].nodes}
        if name not in known:
            raise InspectionError(f"the program has no node {name!r}; {nearest(name, known)}")
        return known[name]


def inspect_model(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    plan: Plan,
    hardware: Hardware,
    *,
    evaluation: bool = False,
    stage: int = 0,
) -> Inspection:
    """Compile one call of `model` under a resolved plan, recording each pass. The model keeps its values.

    evaluation: the program without gradients, of the model in its evaluation mode. stage: which, if the plan cuts the
        model into several; the call is then that of a microbatch.
    """
    model.train(not evaluation)
    recorder = Recorder()
    with torch.set_grad_enabled(not evaluation):
        compiled = lower(model, args, kwargs, plan, stage=stage, layouts=recorder.layouts, observer=recorder.observe)
    assert recorder.program is not None
    return Inspection(
        title=type(model).__name__,
        plan=plan,
        report=compiled.report,
        stages=recorder.stages,
        program=recorder.program,
        hardware=hardware,
        recorder=recorder,
        halves=compiled.halves,
    )
