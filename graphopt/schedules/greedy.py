"""A schedule from priorities: each rank runs, of what is ready and fits into memory, what comes first."""

from dataclasses import dataclass
from math import inf

from graphopt.schedules.actions import Action, Schedule, Work
from graphopt.schedules.timeline import StageTimes

WORKS = (Work.FORWARD, Work.INPUT_GRADIENT, Work.WEIGHT_GRADIENT)
_FORWARD, _INPUT, _WEIGHT = range(3)

Keys = list[tuple[list[float], ...]]
"""By stage, by work in the order of `WORKS`, by microbatch: what is less comes first."""


@dataclass(frozen=True)
class Problem:
    """What is to be scheduled. times, sizes: by stage, a microbatch's seconds and what it keeps alive (as bytes).

    stages: by rank, those on it, ascending. caps: by rank, the most that may be alive on it, at least one microbatch on
    each of its stages.
    """

    microbatches: int
    rank_of_stage: tuple[int, ...]
    stages: tuple[tuple[int, ...], ...]
    times: tuple[StageTimes, ...]
    sizes: tuple[float, ...]
    caps: tuple[float, ...]
    transfer_seconds: float


@dataclass(frozen=True)
class Manner:
    """How to place. patience: seconds that a rank waits for what has a lesser key than what it could run at once.

    pace: seconds between the starts of microbatches, at least; where memory is short, all that fit at once are a jam.
    """

    patience: float = 0
    pace: float = 0


class _Placing:
    """What is placed so far: the ends of what each stage has done, by work, in the order of microbatches."""

    def __init__(self, problem: Problem, keys: Keys, manner: Manner) -> None:
        self.problem, self.keys, self.manner = problem, keys, manner
        self.seconds = [tuple(times.of(work) for work in WORKS) for times in problem.times]
        self.ends: list[tuple[list[float], ...]] = [([], [], []) for _ in problem.times]
        self.free: list[float] = [0] * len(problem.stages)
        self.rows: list[list[Action]] = [[] for _ in problem.stages]

    def run(self, start: float, stage: int, work: int) -> None:
        rank = self.problem.rank_of_stage[stage]
        self.free[rank] = start + self.seconds[stage][work]
        self.rows[rank].append(Action(stage, WORKS[work], len(self.ends[stage][work])))
        self.ends[stage][work].append(self.free[rank])

    def choose(self, rank: int) -> tuple[float, int, int] | None:
        """What a rank runs next: start, stage and index of the work. None while nothing can run."""
        ready = []
        for stage in self.problem.stages[rank]:
            for work in (_FORWARD, _INPUT, _WEIGHT):
                start = self._start(rank, stage, work)
                if start < inf:
                    ready.append((self.keys[stage][work][len(self.ends[stage][work])], start, stage, work))
        if not ready:
            return None
        latest = min(start for _, start, _, _ in ready) + self.manner.patience
        _, start, stage, work = min(each for each in ready if each[1] <= latest)
        return start, stage, work

    def _start(self, rank: int, stage: int, work: int) -> float:
        """When the stage's next microbatch of a work can start; infinite while what it needs or memory is missing."""
        ends = self.ends[stage]
        microbatch = len(ends[work])
        if work == _FORWARD:
            if microbatch == self.problem.microbatches or not self._fits(rank, stage):
                return inf
            before = stage - 1
        else:
            if microbatch == len(ends[work - 1]):
                return inf
            before = stage + 1 if work == _INPUT and stage + 1 < len(self.ends) else -1
        if before < 0:
            return max(self.free[rank], microbatch * self.manner.pace) if work == _FORWARD else self.free[rank]
        given = self.ends[before][work]
        if microbatch >= len(given):
            return inf
        away = self.problem.rank_of_stage[before] != rank
        return max(self.free[rank], given[microbatch] + (self.problem.transfer_seconds if away else 0))

    def _fits(self, rank: int, stage: int) -> bool:
        """Whether a stage's next forward fits, and leaves room to end all microbatches, the earliest first.

        Those are the safe states of Dijkstra's banker: once all before a microbatch have ended, what it and those after
        it keep fits, together with what it has still to take. The worst are those that are next on some stage.
        """
        sizes, cap = self.problem.sizes, self.problem.caps[rank]
        spans = []  # of each stage: the first microbatch alive, the first not yet taken, the size of each
        alive: float = 0
        for other in self.problem.stages[rank]:
            forward, _, weight = self.ends[other]
            spans.append((len(weight), len(forward) + (other == stage), sizes[other]))
            alive += (spans[-1][1] - spans[-1][0]) * sizes[other]
        if alive > cap:
            return False
        for _, first, _ in spans:
            if first < self.problem.microbatches:
                kept: float = 0
                for oldest, taken, size in spans:
                    kept += (1 if taken <= first else taken - max(first, oldest)) * size
                if kept > cap:
                    return False
        return True


def place(problem: Problem, keys: Keys, manner: Manner) -> tuple[Schedule, float]:
    """A schedule and its makespan: actions are placed in the order of their starts; of a rank's, the least key first.

    On each stage microbatches are taken in ascending order.
    """
    placing = _Placing(problem, keys, manner)
    owner = problem.rank_of_stage
    choices = [placing.choose(rank) for rank in range(len(problem.stages))]
    while waiting := [choice for choice in choices if choice is not None]:
        start, stage, work = min(waiting)
        placing.run(start, stage, work)
        for rank in {owner[near] for near in (stage - 1, stage, stage + 1) if 0 <= near < len(owner)}:
            choices[rank] = placing.choose(rank)
    return Schedule("searched", problem.microbatches, owner, tuple(map(tuple, placing.rows))), max(placing.free)
