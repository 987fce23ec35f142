"""How many microbatches a schedule keeps alive: counted for any, in closed form for the published ones."""

from collections.abc import Sequence

from graphopt.errors import PlanError
from graphopt.nearest import nearest
from graphopt.schedules.actions import Schedule, Work
from graphopt.schedules.published import NAMES, Shape


def peak_live(schedule: Schedule, sizes: Sequence[float] | None = None) -> tuple[float, ...]:
    """By pipeline rank, the most that is alive on it at once, over its stages.

    A microbatch lives on a stage from its forward to its backward, or to its weight gradients. sizes: by stage, what a
    microbatch takes, as bytes; None to count each as one. Raises PlanError if sizes are not one a stage.
    """
    if sizes is not None and len(sizes) != schedule.stages:
        raise PlanError(f"the schedule '{schedule.name}' has {schedule.stages} stages, sizes are given of {len(sizes)}")
    peaks: list[float] = []
    for row in schedule.rows:
        alive: float = 0
        peak: float = 0
        for action in row:
            size = 1 if sizes is None else sizes[action.stage]
            if action.work is Work.FORWARD:
                alive += size
                peak = max(peak, alive)
            elif action.work is not Work.INPUT_GRADIENT:
                alive -= size
        peaks.append(peak)
    return tuple(peaks)


def live_bound(name: str, ranks: int, microbatches: int, stages_per_rank: int) -> tuple[int, ...]:
    """By pipeline rank, what `peak_live` of a published schedule is never above, of microbatches on a stage.

    For p ranks, m microbatches and v stages a rank, in rounds of m / max(1, m // p), on rank r: m v where all
    forwards come first; p - r for 1f1b, (v - 1) round + 2 (p - 1 - r) + 1 interleaved (Narayanan et al. 2021);
    (v - 1) round + p for zero-bubble and 2 p for zbv (Qi et al. 2023, who count 1 for all stages of a rank);
    2 p + 1 for dualpipev (DeepSeek-AI 2024, likewise); m v at most. Raises PlanError for an unknown name.
    """
    return tuple(_bound(name, Shape(ranks, microbatches, stages_per_rank, rank)) for rank in range(ranks))


def _bound(name: str, shape: Shape) -> int:
    turns = (shape.stages_per_rank - 1) * shape.round
    match name:
        case "gpipe" | "breadth-first":
            bound = shape.forwards
        case "1f1b":
            bound = shape.hops + 1
        case "interleaved":
            bound = turns + 2 * shape.hops + 1
        case "zero-bubble":
            bound = turns + shape.ranks
        case "zbv":
            bound = 2 * shape.ranks
        case "dualpipev":
            bound = 2 * shape.ranks + 1
        case _:
            raise PlanError(f"no schedule is called '{name}'; {nearest(name, NAMES)}")
    return min(bound, shape.forwards)
