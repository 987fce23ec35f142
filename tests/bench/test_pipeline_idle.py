"""The bubble of sleeping stages is compared with the simulator's as it should be."""

from collections.abc import Callable

import pytest

from bench.pipeline_idle import Measured, compared, measured, stage_seconds
from graphopt.schedules import Schedule, StageTimes, published, simulate
from tests.support.ranks import Ranks

UNIT = 0.004


def _schedule() -> Schedule:
    return published("interleaved", 2, 4)


def test_a_run_that_is_as_simulated_has_a_ratio_of_one() -> None:
    each = stage_seconds(_schedule(), UNIT)
    timeline = simulate(_schedule(), [StageTimes(each, each, each)] * _schedule().stages)
    busy = [sum(span.end - span.start for span in row) for row in timeline.rows]
    found = compared(_schedule(), UNIT, [[(7.0, 7 + timeline.makespan, seconds)] * 3 for seconds in busy])
    assert found["ratio"]["median"] == pytest.approx(1) and found["makespan_ratio"]["median"] == pytest.approx(1)
    late = compared(_schedule(), UNIT, [[(7.0, 7 + 2 * timeline.makespan, seconds)] for seconds in busy])
    assert late["idle"]["median"] == pytest.approx((1 + timeline.idle_fraction) / 2)


def _run(rank: int, world: int) -> list[Measured]:
    (found,) = measured([_schedule()], UNIT, 10, 2)
    return found


def test_stages_sleep_as_long_as_they_should(ranks: Callable[[int], Ranks]) -> None:
    """Four microbatches through two stages a rank; a run cannot be shorter than the simulated one."""
    found = compared(_schedule(), UNIT, ranks(2).run(_run))
    assert found["idle"]["count"] == 2
    assert found["makespan_ratio"]["low"] > 0.999 and 0 < found["idle"]["median"] < 1
