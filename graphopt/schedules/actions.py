"""What a pipeline schedule is: for each pipeline rank, the order of its computations."""

import enum
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Self

from graphopt.errors import PlanError


class Work(enum.Enum):
    """What is computed of a stage for one microbatch."""

    FORWARD = "F"
    BACKWARD = "B"
    INPUT_GRADIENT = "I"
    WEIGHT_GRADIENT = "W"


_FORM = re.compile(r"(\d+)([FBIW])(\d+)")
_OVERLAPPED = re.compile(r"\(([^)]*)\)OVERLAP_F_B")


@dataclass(frozen=True)
class Action:
    """One computation: `work` of a stage for a microbatch, both counted from 0. ``2F0`` as text."""

    stage: int
    work: Work
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.work.value}{self.microbatch}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """The action that prints as `text`. Raises PlanError for another text."""
        found = _FORM.fullmatch(text)
        if found is None:
            raise PlanError(
                f"'{text}' is no action: write stage, work and microbatch, as in '2F0'; "
                "F is a forward, B a backward, I the gradients of inputs, W those of weights"
            )
        return cls(int(found[1]), Work(found[2]), int(found[3]))


@dataclass(frozen=True)
class Schedule:
    """What each pipeline rank computes, in order; what crosses between ranks follows from it.

    rank_of_stage: by stage, the pipeline rank that has it. rows: by pipeline rank, its actions. `check` checks it.
    """

    name: str
    microbatches: int
    rank_of_stage: tuple[int, ...]
    rows: tuple[tuple[Action, ...], ...]

    @property
    def ranks(self) -> int:
        return len(self.rows)

    @property
    def stages(self) -> int:
        return len(self.rank_of_stage)

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages on a pipeline rank, ascending."""
        return tuple(stage for stage, owner in enumerate(self.rank_of_stage) if owner == rank)

    @cached_property
    def splits_backward(self) -> bool:
        """Whether gradients of inputs and of weights are anywhere computed apart."""
        return any(action.work in (Work.INPUT_GRADIENT, Work.WEIGHT_GRADIENT) for row in self.rows for action in row)

    def to_text(self) -> str:
        """A line a rank, actions between commas: the form that torch.distributed.pipelining reads and writes."""
        return "".join(",".join(map(str, row)) + "\n" for row in self.rows)

    @classmethod
    def from_text(cls, text: str, name: str = "given") -> Self:
        """The schedule of lines as `to_text` writes them.

        Empty cells are skipped; of a pair that torch overlaps, the first comes first. Raises PlanError for what is no
        action, and for what `check` finds.
        """
        lines = [line for line in _OVERLAPPED.sub(r"\1", text).replace(";", ",").splitlines() if line.strip()]
        rows = tuple(tuple(Action.parse(cell.strip()) for cell in line.split(",") if cell.strip()) for line in lines)
        owners = {action.stage: rank for rank, row in enumerate(rows) for action in row}
        microbatches = 1 + max((action.microbatch for row in rows for action in row), default=-1)
        stages = 1 + max(owners, default=-1)
        if missing := [stage for stage in range(stages) if stage not in owners]:
            raise PlanError(f"the schedule '{name}' has stages up to {stages - 1}, and no action of stage {missing[0]}")
        schedule = cls(name, microbatches, tuple(owners[stage] for stage in range(stages)), rows)
        check(schedule)
        return schedule


def forwards(schedule: Schedule) -> Schedule:
    """The forwards of a schedule alone, in its order."""
    rows = tuple(tuple(action for action in row if action.work is Work.FORWARD) for row in schedule.rows)
    return Schedule(f"forwards of {schedule.name}", schedule.microbatches, schedule.rank_of_stage, rows)


def given(action: Action) -> Action:
    """What others wait for when they wait for an action: a whole backward gives what gradients of inputs give."""
    if action.work is Work.BACKWARD:
        return Action(action.stage, Work.INPUT_GRADIENT, action.microbatch)
    return action


def needs(action: Action, stages: int) -> tuple[Action, ...]:
    """What has to be done before an action of a pipeline of so many stages, on whichever rank, as `given` names it."""
    stage, microbatch = action.stage, action.microbatch
    match action.work:
        case Work.FORWARD:
            return (Action(stage - 1, Work.FORWARD, microbatch),) if stage else ()
        case Work.WEIGHT_GRADIENT:
            return (Action(stage, Work.INPUT_GRADIENT, microbatch),)
    before = Action(stage, Work.FORWARD, microbatch)
    return (before,) if stage == stages - 1 else (before, Action(stage + 1, Work.INPUT_GRADIENT, microbatch))


def sequence(schedule: Schedule) -> list[Action]:
    """The actions of all ranks in one order, each after those before it on its rank and after what it needs.

    Raises PlanError if there is none: ranks would wait for each other for ever.
    """
    done: set[Action] = set()
    order: list[Action] = []
    places = [0] * schedule.ranks
    advanced = True
    while advanced:
        advanced = False
        for rank, row in enumerate(schedule.rows):
            while places[rank] < len(row) and done.issuperset(needs(row[places[rank]], schedule.stages)):
                order.append(row[places[rank]])
                done.add(given(order[-1]))
                places[rank] += 1
                advanced = True
    stuck = [
        (rank, row[place]) for rank, (row, place) in enumerate(zip(schedule.rows, places, strict=True)) if row[place:]
    ]
    if stuck:
        waits = "; ".join(_waits(schedule, done, rank, action) for rank, action in stuck[:4])
        raise PlanError(f"the schedule '{schedule.name}' never ends: {waits}")
    return order


def _waits(schedule: Schedule, done: set[Action], rank: int, action: Action) -> str:
    missing = next(need for need in needs(action, schedule.stages) if need not in done)
    other = schedule.rank_of_stage[missing.stage]
    wanted = next((found for found in schedule.rows[other] if given(found) == missing), missing)
    return f"rank {rank} waits at {action} for {wanted} of rank {other}"


def check(schedule: Schedule) -> None:
    """Each forward and backward is there once, on the rank that has the stage, in an order that comes to an end.

    Raises PlanError that names rank and action.
    """
    name = f"the schedule '{schedule.name}'"
    if schedule.microbatches < 1:
        raise PlanError(f"{name} is of {schedule.microbatches} microbatches; the least is 1")
    if idle := set(range(schedule.ranks)) - set(schedule.rank_of_stage):
        raise PlanError(f"{name}: rank {min(idle)} has no stage; give it one, or make it a schedule of fewer ranks")
    if beyond := [rank for rank in schedule.rank_of_stage if not 0 <= rank < schedule.ranks]:
        raise PlanError(f"{name} puts a stage on rank {beyond[0]}, but has rows up to rank {schedule.ranks - 1}")
    works: dict[tuple[int, int], list[Work]] = {
        (stage, microbatch): [] for stage in range(schedule.stages) for microbatch in range(schedule.microbatches)
    }
    for rank, row in enumerate(schedule.rows):
        for action in row:
            if (action.stage, action.microbatch) not in works:
                most = f"the last stage is {schedule.stages - 1}, the last microbatch {schedule.microbatches - 1}"
                raise PlanError(f"{name}: rank {rank} has {action}; {most}")
            if (owner := schedule.rank_of_stage[action.stage]) != rank:
                raise PlanError(f"{name}: rank {rank} has {action}, but stage {action.stage} is on rank {owner}")
            works[action.stage, action.microbatch].append(action.work)
    for (stage, microbatch), found in works.items():
        if sorted(work.value for work in found) not in (["B", "F"], ["F", "I", "W"]):
            rank, all_works = schedule.rank_of_stage[stage], "{0}F{1} and either {0}B{1} or {0}I{1} and {0}W{1}"
            listed = ", ".join(str(Action(stage, work, microbatch)) for work in found) or "nothing"
            raise PlanError(
                f"{name}: rank {rank} has {listed} for stage {stage} and microbatch {microbatch}; "
                f"it takes {all_works.format(stage, microbatch)}, each once"
            )
    sequence(schedule)
