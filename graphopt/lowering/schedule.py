"""The schedule by which a plan sends microbatches through the stages of its pipeline."""

import functools
from collections.abc import Sequence
from pathlib import Path

from graphopt.errors import PlanError
from graphopt.nearest import nearest
from graphopt.plan import Plan
from graphopt.plan.sections import SEARCH
from graphopt.schedules import NAMES, Schedule, StageTimes, peak_live, published, search


def planned_schedule(plan: Plan, times: Sequence[StageTimes] | None = None) -> Schedule:
    """That of a resolved plan. Raises PlanError if there is none for its ranks, stages and microbatches.

    times: by stage, for a plan that has its schedule searched; without them all stages are taken to be alike, which
    gives the same ranks and number of stages.
    """
    asked, ranks = plan.pipeline, plan.pipeline_ranks
    if asked.schedule == SEARCH:
        return _searched(plan, times)
    if asked.schedule in NAMES:
        return published(asked.schedule, ranks, plan.microbatches, asked.stages_per_rank)
    if not Path(asked.schedule).suffix:
        raise PlanError(f"no schedule is called '{asked.schedule}'; {nearest(asked.schedule, (*NAMES, SEARCH))}")
    try:
        text = Path(asked.schedule).read_text(encoding="utf-8")
    except OSError as error:
        raise PlanError(f"pipeline.schedule={asked.schedule} cannot be read: {error.strerror}") from error
    schedule = Schedule.from_text(text, Path(asked.schedule).stem)
    if schedule.ranks != ranks or schedule.microbatches != plan.microbatches:
        raise PlanError(
            f"pipeline.schedule={asked.schedule} is for pp={schedule.ranks} and pipeline.microbatches="
            f"{schedule.microbatches}; the plan has pp={ranks} and {plan.microbatches} microbatches"
        )
    return schedule


def _searched(plan: Plan, times: Sequence[StageTimes] | None) -> Schedule:
    """Two stages a rank lie there and back, as those of zbv; other numbers round and round."""
    ranks, stages_per_rank = plan.pipeline_ranks, plan.pipeline.stages_per_rank or 2
    there = list(range(ranks))
    layout = tuple(there + there[::-1] if stages_per_rank == 2 else there * stages_per_rank)
    cap = plan.pipeline.live or ranks * stages_per_rank
    if times is None:
        return _for_alike_stages(plan.microbatches, layout, cap)
    return search(ranks, plan.microbatches, times, layout, cap)


@functools.cache  # asked for by every stage that is compiled, and a second's work for many ranks
def _for_alike_stages(microbatches: int, layout: tuple[int, ...], cap: int) -> Schedule:
    times = [StageTimes(1, 1, 1)] * len(layout)
    return search(1 + max(layout), microbatches, times, layout, cap, effort=0)


def live_counts(plan: Plan) -> list[int]:
    """By stage, the most microbatches that are alive on it at a time."""
    schedule = planned_schedule(plan)
    if plan.pipeline.schedule == SEARCH:  # its order is not known yet
        return [min(plan.pipeline.live or schedule.stages, plan.microbatches)] * schedule.stages
    alone = [[float(stage == other) for other in range(schedule.stages)] for stage in range(schedule.stages)]
    return [int(peak_live(schedule, alone[stage])[rank]) for stage, rank in enumerate(schedule.rank_of_stage)]
