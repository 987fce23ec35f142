"""The schedule by which a plan sends microbatches through the stages of its pipeline."""

from pathlib import Path

from graphopt.errors import PlanError
from graphopt.plan import Plan
from graphopt.schedules import NAMES, Schedule, peak_live, published


def planned_schedule(plan: Plan) -> Schedule:
    """That of a resolved plan. Raises PlanError if there is none for its ranks, stages and microbatches."""
    asked, ranks = plan.pipeline, plan.pipeline_ranks
    if asked.schedule in NAMES or not Path(asked.schedule).suffix:
        return published(asked.schedule, ranks, plan.microbatches, asked.stages_per_rank)
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


def live_counts(schedule: Schedule) -> list[int]:
    """By stage, the most microbatches that are alive on it at a time."""
    alone = [[float(stage == other) for other in range(schedule.stages)] for stage in range(schedule.stages)]
    return [int(peak_live(schedule, alone[stage])[rank]) for stage, rank in enumerate(schedule.rank_of_stage)]
