"""A stage as it is compiled on a rank, and whether those of all ranks fit together."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from graphopt.capture.guards import AttributeGuard
from graphopt.capture.structure import Template
from graphopt.emit.stage import StageProgram
from graphopt.errors import RankMismatchError
from graphopt.ir import ParameterLayout
from graphopt.report import Report
from graphopt.runtime.messages import TensorSpec
from graphopt.schedules import StageTimes


@dataclass
class CompiledStage:
    """One stage, for calls of one key.

    names: of the call's tensors. template: rebuilds what the model returns of `outputs`, all of them, by name. loss:
    the name of that which is the loss, in training. collectives: what it exchanges, a line for each call, in order.
    times: seconds for a microbatch, as the cost model says.
    """

    program: StageProgram
    report: Report
    attributes: AttributeGuard
    names: list[str]
    template: Template
    outputs: Mapping[str, TensorSpec]
    loss: str | None
    collectives: str
    layouts: Mapping[str, ParameterLayout]
    times: StageTimes

    @property
    def wanted(self) -> Collection[str]:
        """Outputs to keep: of a step in training nobody sees any but the loss."""
        return self.outputs if self.loss is None else (self.loss,)


@dataclass
class Specialization:
    """The stages of this rank for calls of one key; owners: the stage that makes each output, by its name."""

    stages: Mapping[int, CompiledStage]
    owners: Mapping[str, int]

    @property
    def any_stage(self) -> CompiledStage:
        """From which can be read what all stages have in common."""
        return next(iter(self.stages.values()))


@dataclass(frozen=True)
class StageFacts:
    """What neighbours and twins of a stage must agree with."""

    received: list[str]
    sent: list[str]
    collectives: str
    outputs: list[str]

    @classmethod
    def of(cls, stage: CompiledStage) -> Self:
        program = stage.program
        return cls(
            [str(each) for each in program.received],
            [str(each) for each in program.sent],
            stage.collectives,
            program.user_outputs,
        )


def fitting(facts: Sequence[Mapping[int, StageFacts]]) -> dict[str, int]:
    """The stage that makes each output. Raises RankMismatchError, on all ranks alike, if stages do not fit."""
    found: dict[int, tuple[int, StageFacts]] = {}
    for rank, its in enumerate(facts):
        for stage, fact in its.items():
            first, known = found.setdefault(stage, (rank, fact))
            if fact != known:
                raise RankMismatchError(f"stage {stage} of rank {rank} is not that of rank {first}")
    for stage in sorted(found)[:-1]:
        sent, received = found[stage][1].sent, found[stage + 1][1].received
        if sent != received:
            raise RankMismatchError(f"stage {stage} sends {sent}, stage {stage + 1} expects {received}")
    return {name: stage for stage, (_, fact) in found.items() for name in fact.outputs}
