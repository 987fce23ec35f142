"""When each action of a schedule runs, from the durations of the stages: its makespan, its bubble, what is live."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from graphopt.errors import PlanError
from graphopt.schedules.actions import Action, Schedule, Work, given, needs, sequence


@dataclass(frozen=True)
class StageTimes:
    """Seconds that a stage takes for one microbatch; a whole backward takes those of both gradients.

    Any unit does, if it is one. Integers and fractions give exact results.
    """

    forward: float
    input_gradient: float
    weight_gradient: float

    @property
    def backward(self) -> float:
        return self.input_gradient + self.weight_gradient

    @property
    def all(self) -> float:
        return self.forward + self.backward

    def of(self, work: Work) -> float:
        match work:
            case Work.FORWARD:
                return self.forward
            case Work.BACKWARD:
                return self.backward
            case Work.INPUT_GRADIENT:
                return self.input_gradient
            case Work.WEIGHT_GRADIENT:
                return self.weight_gradient


@dataclass(frozen=True)
class Span:
    """An action and when it starts and ends, in seconds from the start of the step."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """A schedule in time. rows: by pipeline rank, its actions in order with their times."""

    schedule: Schedule
    rows: tuple[tuple[Span, ...], ...]

    @cached_property
    def makespan(self) -> float:
        """Seconds from the first start to the last end."""
        return max(row[-1].end for row in self.rows)

    @cached_property
    def idle_seconds(self) -> tuple[float, ...]:
        """By rank, the seconds of the makespan in which it computes nothing: its bubble."""
        return tuple(self.makespan - sum(span.end - span.start for span in row) for row in self.rows)

    @property
    def idle_fraction(self) -> float:
        """The share of all ranks' time in which they are idle."""
        return sum(self.idle_seconds) / (self.makespan * len(self.rows))

    def live(self, rank: int) -> list[tuple[float, int]]:
        """The microbatches alive on a rank over time: (seconds, how many from then on), ascending.

        It lives on a stage from the start of its forward to the end of its backward, or of its weight gradients.
        """
        changes: dict[float, int] = {}
        for span in self.rows[rank]:
            if span.action.work is Work.FORWARD:
                changes[span.start] = changes.get(span.start, 0) + 1
            elif span.action.work is not Work.INPUT_GRADIENT:
                changes[span.end] = changes.get(span.end, 0) - 1
        alive, over_time = 0, []
        for moment in sorted(changes):
            alive += changes[moment]
            over_time.append((moment, alive))
        return over_time

    def to_text(self, columns: int = 80) -> str:
        """A line a rank, the makespan from left to right; a column shows the work in its middle, a dot for none."""
        moments = [(column + 0.5) * self.makespan / columns for column in range(columns)]
        return "".join("".join(_work_at(row, moment) for moment in moments) + "\n" for row in self.rows)


def _work_at(row: tuple[Span, ...], moment: float) -> str:
    return next((span.action.work.value for span in row if span.start <= moment < span.end), ".")


def simulate(schedule: Schedule, durations: Sequence[StageTimes], transfer_seconds: float = 0) -> Timeline:
    """Each rank runs its actions in order, each as soon as what it needs is there.

    durations: by stage. transfer_seconds: from the end of an action until what it gives can be used on another rank,
    while both compute. Raises PlanError if durations are not one a stage, or if the schedule never ends.
    """
    if len(durations) != schedule.stages:
        raise PlanError(
            f"the schedule '{schedule.name}' has {schedule.stages} stages, durations are given of {len(durations)}"
        )
    ends: dict[Action, float] = {}
    rows: list[list[Span]] = [[] for _ in range(schedule.ranks)]
    for action in sequence(schedule):
        rank = schedule.rank_of_stage[action.stage]
        start = rows[rank][-1].end if rows[rank] else 0
        for need in needs(action, schedule.stages):
            away = schedule.rank_of_stage[need.stage] != rank
            start = max(start, ends[need] + transfer_seconds if away else ends[need])
        end = start + durations[action.stage].of(action.work)
        ends[given(action)] = end
        rows[rank].append(Span(action, start, end))
    return Timeline(schedule, tuple(map(tuple, rows)))
