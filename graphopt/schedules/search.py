"""A schedule for given stages and memory: the best of published ones and simple rules, improved by small changes."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from graphopt.errors import PlanError
from graphopt.schedules.actions import Action, Schedule, Work
from graphopt.schedules.bounds import peak_live
from graphopt.schedules.greedy import WORKS, Keys, Manner, Problem, place
from graphopt.schedules.published import NAMES, published
from graphopt.schedules.timeline import StageTimes, simulate


def search(
    ranks: int,
    microbatches: int,
    times: Sequence[StageTimes],
    rank_of_stage: Sequence[int],
    cap: float | Sequence[float],
    sizes: Sequence[float] | None = None,
    transfer_seconds: float = 0,
    effort: int = 60_000,
) -> Schedule:
    """A schedule within a cap of memory that takes no longer than any published one of that layout within it.

    One that is above the cap for all microbatches is taken for as many at a time as fit, one group after the other.

    times: by stage. rank_of_stage: by stage, its rank. cap: what `peak_live` is at most, on all ranks or by rank.
    sizes: by stage, what a microbatch keeps alive, in the unit of the cap; None to count each as one. effort: how many
    actions are placed to improve what was found, a second or two in all. Backwards are split, unless a published
    schedule with whole ones is the best. The same arguments give the same schedule. Raises PlanError if the cap has no
    room for a microbatch on each stage of a rank, and if numbers do not match.
    """
    problem = _problem(ranks, microbatches, times, rank_of_stage, cap, sizes, transfer_seconds)
    bound = _least_makespan(problem)
    starts = _starts(problem)
    best = next(starts)
    for found in starts:
        if best.makespan <= bound:
            break
        best = min(best, found, key=lambda each: each.makespan)
    rng = random.Random(0)
    for _ in range(effort // (len(WORKS) * len(problem.times) * microbatches)):
        if best.makespan <= bound:
            break
        manner = Manner(rng.choice(_patiences(problem)), best.pace)
        found = _placed(problem, _shaken(best.schedule, problem, rng), manner)
        best = min(found, best, key=lambda each: each.makespan)
    return best.schedule


def _least_makespan(problem: Problem) -> float:
    """Seconds that any schedule takes: on some rank, until a microbatch can be there, and then for all its work."""
    least: float = 0
    for stages in problem.stages:
        arrival: float = sum(problem.times[stage].forward for stage in range(stages[0]))
        hops = sum(problem.rank_of_stage[stage] != problem.rank_of_stage[stage + 1] for stage in range(stages[0]))
        least = max(least, arrival + hops * problem.transfer_seconds + _work(problem, stages))
    return least


def _work(problem: Problem, stages: Sequence[int]) -> float:
    return problem.microbatches * sum(problem.times[stage].all for stage in stages)


def _problem(
    ranks: int,
    microbatches: int,
    times: Sequence[StageTimes],
    rank_of_stage: Sequence[int],
    cap: float | Sequence[float],
    sizes: Sequence[float] | None,
    transfer_seconds: float,
) -> Problem:
    sizes = [1] * len(rank_of_stage) if sizes is None else sizes
    caps = [cap] * ranks if isinstance(cap, int | float) else list(cap)
    for what, found, wanted in (
        ("stages with times", len(times), len(rank_of_stage)),
        ("stages with sizes", len(sizes), len(rank_of_stage)),
        ("ranks with caps", len(caps), ranks),
    ):
        if found != wanted:
            raise PlanError(
                f"a search for {len(rank_of_stage)} stages on {ranks} ranks: {found} {what}, it takes {wanted}"
            )
    if microbatches < 1 or set(rank_of_stage) != set(range(ranks)):
        raise PlanError(
            f"a search for {microbatches} microbatches and stages on ranks {sorted(set(rank_of_stage))}: it takes "
            f"1 microbatch or more, and a stage on each of the ranks 0 to {ranks - 1}"
        )
    stages = tuple(tuple(s for s, owner in enumerate(rank_of_stage) if owner == rank) for rank in range(ranks))
    for rank, (there, most) in enumerate(zip(stages, caps, strict=True)):
        if most < (least := sum(sizes[stage] for stage in there)):
            raise PlanError(
                f"rank {rank} has to keep a microbatch on each of its stages: its cap is at least {least}, not {most}"
            )
    return Problem(
        microbatches, tuple(rank_of_stage), stages, tuple(times), tuple(sizes), tuple(caps), transfer_seconds
    )


@dataclass(frozen=True)
class _Found:
    schedule: Schedule
    makespan: float
    pace: float


def _placed(problem: Problem, keys: Keys, manner: Manner) -> _Found:
    return _Found(*place(problem, keys, manner), manner.pace)


def _starts(problem: Problem) -> Iterator[_Found]:
    """Published schedules of this layout within the caps, what their orders come to within them, and simple rules."""
    orders = list(_rules(problem))
    for name in NAMES:
        if whole := _in_groups(problem, name, problem.microbatches):
            orders.append(_keys(whole, problem))
        groups = (_in_groups(problem, name, group) for group in range(problem.microbatches, 0, -1))
        if fitting := next((schedule for schedule in groups if schedule and _fits(problem, schedule)), None):
            yield _Found(fitting, simulate(fitting, problem.times, problem.transfer_seconds).makespan, 0)
    for keys, patience, pace in product(orders, _patiences(problem), _paces(problem)):
        yield _placed(problem, keys, Manner(patience, pace))


def _in_groups(problem: Problem, name: str, group: int) -> Schedule | None:
    """A published schedule of groups of microbatches, one after the other; None if it has no such form or layout."""
    rows: list[list[Action]] = [[] for _ in problem.stages]
    for first in range(0, problem.microbatches, group):
        number = min(group, problem.microbatches - first)
        try:
            schedule = published(name, len(rows), number, len(problem.rank_of_stage) // len(rows))
        except PlanError:
            return None
        if schedule.rank_of_stage != problem.rank_of_stage:
            return None
        for row, actions in zip(rows, schedule.rows, strict=True):
            row.extend(replace(action, microbatch=first + action.microbatch) for action in actions)
    return Schedule(name, problem.microbatches, problem.rank_of_stage, tuple(map(tuple, rows)))


def _fits(problem: Problem, schedule: Schedule) -> bool:
    return all(peak <= cap for peak, cap in zip(peak_live(schedule, problem.sizes), problem.caps, strict=True))


def _rules(problem: Problem) -> Iterator[Keys]:
    """Input gradients before forwards or after them; of each, late stages or early microbatches first."""
    stages, microbatches = len(problem.times), problem.microbatches
    for works, by_stage in product(((1, 0, 2), (0, 1, 2)), (True, False)):
        to_next_stage, to_next_microbatch = (microbatches, 1) if by_stage else (1, stages)
        yield [
            tuple(
                [
                    work * stages * microbatches + late * to_next_stage + microbatch * to_next_microbatch
                    for microbatch in range(microbatches)
                ]
                for work in works
            )
            for late in reversed(range(stages))
        ]


def _patiences(problem: Problem) -> list[float]:
    """How long to wait for what is more urgent: not at all, or for parts of the longest action of weight gradients."""
    longest = max(times.weight_gradient for times in problem.times)
    return [0, longest / 4, longest / 2, longest]


def _paces(problem: Problem) -> list[float]:
    """As fast as memory allows, or about as fast as the slowest rank goes."""
    slowest = max(_work(problem, stages) for stages in problem.stages) / problem.microbatches
    return [0, 0.8 * slowest, 0.9 * slowest, slowest, 1.1 * slowest]


def _keys(schedule: Schedule, problem: Problem) -> Keys:
    """Priorities of which a schedule follows: the start of each action."""
    keys: Keys = [tuple([0.0] * problem.microbatches for _ in WORKS) for _ in problem.times]
    for row in simulate(schedule, problem.times, problem.transfer_seconds).rows:
        for span in row:
            stage, microbatch = span.action.stage, span.action.microbatch
            if span.action.work is Work.BACKWARD:
                keys[stage][1][microbatch] = keys[stage][2][microbatch] = span.start
            else:
                keys[stage][WORKS.index(span.action.work)][microbatch] = span.start
    return keys


def _shaken(schedule: Schedule, problem: Problem, rng: random.Random) -> Keys:
    """The keys of a schedule, some of them moved by up to a few actions: of one rank, or here and there."""
    keys = _keys(schedule, problem)
    reach = 3 * max(times.all for times in problem.times)
    stages = rng.choice([*problem.stages, tuple(range(len(problem.times)))])
    share = rng.choice((0.03, 0.1, 0.3))
    for stage, work in product(stages, range(len(WORKS))):
        for microbatch in range(problem.microbatches):
            if rng.random() < share:
                keys[stage][work][microbatch] += rng.uniform(-reach, reach)
    return keys
