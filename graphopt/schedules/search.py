"""A schedule for given stages and memory: the best of published ones and simple rules, improved by small changes."""

import random
from collections.abc import Iterator, Sequence
from itertools import product

from graphopt.errors import PlanError
from graphopt.schedules.actions import Schedule, Work
from graphopt.schedules.bounds import peak_live
from graphopt.schedules.greedy import WORKS, Keys, Problem, place
from graphopt.schedules.published import NAMES, published
from graphopt.schedules.timeline import StageTimes, simulate

_ACTIONS_PLACED = 100_000
"""How many actions are placed in all trials of a search: it bounds its time, whatever the size of the schedule."""


def search(
    ranks: int,
    microbatches: int,
    times: Sequence[StageTimes],
    rank_of_stage: Sequence[int],
    cap: float | Sequence[float],
    sizes: Sequence[float] | None = None,
    transfer_seconds: float = 0,
) -> Schedule:
    """A schedule within a cap of memory, that takes no longer than any published one of that layout within it.

    times: by stage. rank_of_stage: by stage, its rank. cap: what `peak_live` is at most, on all ranks or by rank. sizes: by
    stage, what a microbatch keeps alive, in the unit of the cap; None to count each as one. Backwards are split, unless
    a published schedule with whole ones is the best. The same arguments give the same schedule. Raises PlanError if the
    cap has no room for a microbatch on each stage of a rank, and if numbers do not match.
    """
    problem = _problem(ranks, microbatches, times, rank_of_stage, cap, sizes, transfer_seconds)
    bound = least_makespan(problem)
    best, makespan = min(_starts(problem), key=lambda found: found[1])
    rng = random.Random(0)
    actions = len(WORKS) * len(problem.times) * microbatches
    for _ in range(max(30, _ACTIONS_PLACED // actions)):
        if makespan <= bound:
            break
        found, seconds = place(problem, _shaken(best, problem, rng), rng.choice(_patiences(problem)))
        if seconds <= makespan:
            best, makespan = found, seconds
    return best


def least_makespan(problem: Problem) -> float:
    """Seconds that any schedule takes: on some rank, until the first microbatch comes there, and then for all its work."""
    least: float = 0
    for stages in problem.stages:
        arrival: float = sum(problem.times[stage].forward for stage in range(stages[0]))
        hops = sum(problem.rank_of_stage[stage] != problem.rank_of_stage[stage + 1] for stage in range(stages[0]))
        work = problem.microbatches * sum(problem.times[stage].all for stage in stages)
        least = max(least, arrival + hops * problem.transfer_seconds + work)
    return least


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
            f"a search for {microbatches} microbatches, stages on ranks {sorted(set(rank_of_stage))}: it takes at least "
            f"1 microbatch, and a stage on each of the ranks 0 to {ranks - 1}"
        )
    stages = tuple(tuple(s for s, owner in enumerate(rank_of_stage) if owner == rank) for rank in range(ranks))
    for rank, (there, most) in enumerate(zip(stages, caps, strict=True)):
        if most < (least := sum(sizes[stage] for stage in there)):
            raise PlanError(
                f"rank {rank} keeps one microbatch on each of its {len(there)} stages: the least cap is {least}, not {most}"
            )
    return Problem(
        microbatches, tuple(rank_of_stage), stages, tuple(times), tuple(sizes), tuple(caps), transfer_seconds
    )


def _starts(problem: Problem) -> Iterator[tuple[Schedule, float]]:
    """Published schedules of this layout within the caps, what their orders come to within them, and simple rules."""
    for schedule in _published(problem):
        timeline = simulate(schedule, problem.times, problem.transfer_seconds)
        if all(peak <= cap for peak, cap in zip(peak_live(schedule, problem.sizes), problem.caps, strict=True)):
            yield schedule, timeline.makespan
        yield from (place(problem, _keys(schedule, problem), patience) for patience in _patiences(problem))
    for rule, patience in product(_rules(problem), _patiences(problem)):
        yield place(problem, rule, patience)


def _published(problem: Problem) -> Iterator[Schedule]:
    ranks, stages = len(problem.stages), len(problem.rank_of_stage)
    for name in NAMES:
        try:
            schedule = published(name, ranks, problem.microbatches, stages // ranks)
        except PlanError:  # no form with these numbers
            continue
        if schedule.rank_of_stage == problem.rank_of_stage:
            yield schedule


def _rules(problem: Problem) -> Iterator[Keys]:
    """Input gradients first, then forwards, or the other way round; of each, late stages or early microbatches first."""
    stages, microbatches = len(problem.times), problem.microbatches
    for works, by_stage in product(((1, 0, 2), (0, 1, 2)), (True, False)):
        step = (stages + microbatches) * microbatches
        yield [
            tuple(
                [
                    work * step
                    + (stages - stage) * (microbatches if by_stage else 1)
                    + microbatch * (1 if by_stage else stages)
                    for microbatch in range(microbatches)
                ]
                for work in works
            )
            for stage in range(stages)
        ]


def _patiences(problem: Problem) -> list[float]:
    """How long to wait for what is more urgent: not at all, or for parts of the longest action of weight gradients."""
    longest = max(times.weight_gradient for times in problem.times)
    return [0, longest / 4, longest / 2, longest]


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
