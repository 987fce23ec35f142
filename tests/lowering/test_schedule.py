"""The schedule that a plan stands for."""

import pytest

from graphopt import Plan, PlanError
from graphopt.lowering.schedule import live_counts, planned_schedule
from graphopt.schedules import StageTimes, check, peak_live, published, simulate

UNEVEN = [*[StageTimes(4, 4, 3)] * 7, StageTimes(8, 8, 6)]  # the last stage has the vocabulary


def _plan(text: str) -> Plan:
    return Plan.parse(f"pp=4,pipeline.microbatches=8,{text}").resolve(4)


def test_a_searched_one_is_for_the_times_of_its_stages() -> None:
    plan = _plan("pipeline=search")
    before, after = planned_schedule(plan), planned_schedule(plan, UNEVEN)
    for schedule in (before, after):
        check(schedule)
        assert schedule.rank_of_stage == published("zbv", 4, 8).rank_of_stage
        assert max(peak_live(schedule)) <= 8
    assert simulate(after, UNEVEN).makespan < simulate(before, UNEVEN).makespan
    assert simulate(after, UNEVEN).makespan <= simulate(published("zbv", 4, 8), UNEVEN).makespan


@pytest.mark.parametrize("live", [2, 4, 7])
def test_a_searched_one_keeps_to_what_may_be_alive(live: int) -> None:
    plan = _plan(f"pipeline=search,pipeline.live={live}")
    found = planned_schedule(plan, UNEVEN)
    assert max(peak_live(found)) <= live
    by_stage = [[float(stage == other) for other in range(8)] for stage in range(8)]
    for stage, count in enumerate(live_counts(plan)):
        assert max(peak_live(found, by_stage[stage])) <= count


def test_one_stage_a_rank_lies_in_order() -> None:
    assert planned_schedule(_plan("pipeline=search,pipeline.stages_per_rank=1")).rank_of_stage == (0, 1, 2, 3)


def test_what_may_be_alive_is_for_a_search() -> None:
    with pytest.raises(PlanError, match=r"pipeline.live=3 is for pipeline.schedule=search, not for zbv"):
        Plan.parse("pp=2,pipeline=zbv,pipeline.live=3")
    with pytest.raises(PlanError, match="its cap is at least 2, not 1"):
        planned_schedule(_plan("pipeline=search,pipeline.live=1"))


def test_a_name_that_is_none_is_told_the_nearest() -> None:
    with pytest.raises(PlanError, match=r"no schedule is called 'serch'.*search"):
        planned_schedule(_plan("pipeline=serch"))
