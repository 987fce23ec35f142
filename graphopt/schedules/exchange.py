"""What crosses between the ranks of a schedule, placed among their computations so that nothing waits for ever."""

from dataclasses import dataclass

from graphopt.schedules.actions import Action, Schedule, Work
from graphopt.schedules.timeline import StageTimes, simulate


@dataclass(frozen=True)
class Compute:
    """Run an action of this rank."""

    action: Action

    def __str__(self) -> str:
        return str(self.action)


@dataclass(frozen=True)
class Send:
    """Send what `stage`, on this rank, has for `other_stage`, a neighbour on another rank.

    gradient: whether it is the gradient of what came forward, or what goes forward.
    """

    stage: int
    other_stage: int
    microbatch: int
    gradient: bool

    def __str__(self) -> str:
        return f"{self.stage}>{self.other_stage}{'g' if self.gradient else 'x'}{self.microbatch}"


@dataclass(frozen=True)
class Receive:
    """Receive for `stage`, on this rank, what `other_stage` sends: the counterpart of a `Send`."""

    stage: int
    other_stage: int
    microbatch: int
    gradient: bool

    def __str__(self) -> str:
        return f"{self.stage}<{self.other_stage}{'g' if self.gradient else 'x'}{self.microbatch}"


Step = Compute | Send | Receive

_EVEN = StageTimes(forward=1, input_gradient=1, weight_gradient=1)


def steps(schedule: Schedule) -> tuple[tuple[Step, ...], ...]:
    """By pipeline rank, its computations in the order of the schedule, with what it sends and receives between them.

    Computations and messages of all ranks lie in one line, by the end of each computation if all take equally long;
    a message comes right after the computation that gives it. Each rank gets its part of the line. So the messages
    between two ranks have one order on both, and nothing waits for ever, even where a send waits for its receive: what
    is first in the line can always go on. A receive stands before the computation during which the message comes: early
    enough to travel beside it, and no earlier, as it takes a buffer. Stages on one rank exchange nothing.
    Raises PlanError if the schedule never ends.
    """
    timeline = simulate(schedule, [_EVEN] * schedule.stages)
    line = sorted((span for row in timeline.rows for span in row), key=lambda span: (span.end, span.action.stage))
    rows: list[list[Step]] = [[] for _ in range(schedule.ranks)]
    for action in (span.action for span in line):
        owner = schedule.rank_of_stage
        rows[owner[action.stage]].append(Compute(action))
        other = _receiver(action, schedule.stages)
        if other is not None and owner[other] != owner[action.stage]:
            gradient = action.work is not Work.FORWARD
            rows[owner[action.stage]].append(Send(action.stage, other, action.microbatch, gradient))
            rows[owner[other]].append(Receive(other, action.stage, action.microbatch, gradient))
    return tuple(map(tuple, rows))


def _receiver(action: Action, stages: int) -> int | None:
    """The stage that waits for what an action gives, if one does."""
    if action.work is Work.FORWARD:
        return action.stage + 1 if action.stage + 1 < stages else None
    return action.stage - 1 if action.stage and action.work is not Work.WEIGHT_GRADIENT else None
