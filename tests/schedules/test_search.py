"""A search keeps to the cap, and is no worse than ZBV at any, whatever the stages take."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.errors import PlanError
from graphopt.schedules import (
    NAMES,
    Action,
    Schedule,
    StageTimes,
    Work,
    check,
    peak_live,
    published,
    search,
    simulate,
    steps,
)

UNIT = StageTimes(1, 1, 1)
stage_times = st.builds(StageTimes, st.integers(2, 12), st.integers(2, 12), st.integers(1, 10))


def _bent(ranks: int) -> tuple[int, ...]:
    return (*range(ranks), *reversed(range(ranks)))


def _is_sound(schedule: Schedule, cap: float, sizes: list[int] | None = None) -> None:
    check(schedule)
    assert steps(schedule)
    assert max(peak_live(schedule, sizes)) <= cap
    for stage, rank in enumerate(schedule.rank_of_stage):
        weights = [
            action.microbatch
            for action in schedule.rows[rank]
            if action.stage == stage and action.work in (Work.BACKWARD, Work.WEIGHT_GRADIENT)
        ]
        assert weights == sorted(weights)


@settings(max_examples=12)
@given(st.data(), st.integers(1, 4), st.integers(1, 8), st.integers(0, 3))
def test_it_is_no_worse_than_zbv_where_messages_take_time(
    data: st.DataObject, ranks: int, microbatches: int, delay: int
) -> None:
    times = data.draw(st.lists(stage_times, min_size=2 * ranks, max_size=2 * ranks))
    zbv = published("zbv", ranks, microbatches)
    cap = max(peak_live(zbv)) + data.draw(st.integers(0, 3))
    found = search(ranks, microbatches, times, _bent(ranks), cap, transfer_seconds=delay, effort=1000)
    _is_sound(found, cap)
    assert simulate(found, times, delay).makespan <= simulate(zbv, times, delay).makespan


@settings(max_examples=12)
@given(st.data(), st.integers(1, 4), st.integers(1, 3), st.integers(1, 6))
def test_it_keeps_to_any_cap_in_any_layout(data: st.DataObject, ranks: int, stages: int, microbatches: int) -> None:
    layout = data.draw(st.permutations(list(range(ranks)) * stages))
    times = data.draw(st.lists(stage_times, min_size=len(layout), max_size=len(layout)))
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=len(layout), max_size=len(layout)))
    least = max(sum(sizes[stage] for stage, owner in enumerate(layout) if owner == rank) for rank in range(ranks))
    cap = least + data.draw(st.integers(0, 20))
    _is_sound(search(ranks, microbatches, times, layout, cap, sizes, effort=500), cap, sizes)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_no_worse_than_any_published_one_within_the_cap(name: str) -> None:
    schedule = published(name, 3, 6)
    times = [StageTimes(2 + stage % 3, 3, 1 + stage % 2) for stage in range(schedule.stages)]
    cap = peak_live(schedule)
    found = search(3, 6, times, schedule.rank_of_stage, cap, effort=1000)
    check(found)
    assert all(peak <= most for peak, most in zip(peak_live(found), cap, strict=True))
    assert simulate(found, times).makespan <= simulate(schedule, times).makespan


def test_uneven_stages_take_less_time_than_under_zbv() -> None:
    """A last stage that takes twice as long, as one with a large vocabulary."""
    times = [*[StageTimes(4, 4, 3)] * 7, StageTimes(8, 8, 6)]
    zbv = simulate(published("zbv", 4, 8), times).makespan
    assert simulate(search(4, 8, times, _bent(4), 8, effort=5000), times).makespan < zbv


def test_half_the_memory_costs_less_than_a_fifth_of_the_time() -> None:
    """As with V-Half (arXiv:2405.15362); to start all that fit at once would take half as long again."""
    found = search(4, 16, [UNIT] * 8, _bent(4), 4, effort=0)
    assert simulate(found, [UNIT] * 8).makespan < 1.2 * simulate(published("zbv", 4, 16), [UNIT] * 8).makespan


def test_the_least_cap_takes_one_microbatch_after_the_other() -> None:
    found = search(2, 3, [UNIT] * 4, _bent(2), 2, effort=0)
    _is_sound(found, 2)
    with pytest.raises(PlanError, match="rank 0 has to keep a microbatch on each of its stages: its cap is at least 2"):
        search(2, 3, [UNIT] * 4, _bent(2), 1)


def test_the_same_arguments_give_the_same_schedule() -> None:
    times = [StageTimes(3 + stage, 4, 2) for stage in range(4)]
    assert search(2, 4, times, _bent(2), 3, effort=2000) == search(2, 4, times, _bent(2), 3, effort=2000)


def test_numbers_that_do_not_match_are_refused() -> None:
    with pytest.raises(PlanError, match="4 stages on 2 ranks: 3 stages with times, it takes 4"):
        search(2, 4, [UNIT] * 3, _bent(2), 4)
    with pytest.raises(PlanError, match="1 stages with sizes, it takes 4"):
        search(2, 4, [UNIT] * 4, _bent(2), 4, sizes=[1])
    with pytest.raises(PlanError, match="1 ranks with caps, it takes 2"):
        search(2, 4, [UNIT] * 4, _bent(2), [4])
    with pytest.raises(PlanError, match="a stage on each of the ranks 0 to 2"):
        search(3, 4, [UNIT] * 4, _bent(2), 4)
    with pytest.raises(PlanError, match="for 0 microbatches"):
        search(2, 0, [UNIT] * 4, _bent(2), 4)


def _zbv_in_groups(ranks: int, microbatches: int, cap: int) -> Schedule:
    """ZBV for as many microbatches at a time as a cap has room for, one group after the other."""
    group = next(size for size in range(microbatches, 0, -1) if max(peak_live(published("zbv", ranks, size))) <= cap)
    rows: list[list[Action]] = [[] for _ in range(ranks)]
    for first in range(0, microbatches, group):
        part = published("zbv", ranks, min(group, microbatches - first))
        for row, actions in zip(rows, part.rows, strict=True):
            row += [Action(action.stage, action.work, first + action.microbatch) for action in actions]
    return Schedule("zbv in groups", microbatches, _bent(ranks), tuple(map(tuple, rows)))


def _is_no_worse_than_zbv(ranks: int, microbatches: int, times: list[StageTimes], cap: int, effort: int) -> None:
    found = search(ranks, microbatches, times, _bent(ranks), cap, effort=effort)
    _is_sound(found, cap)
    zbv = _zbv_in_groups(ranks, microbatches, cap)
    _is_sound(zbv, cap)
    assert simulate(found, times).makespan <= simulate(zbv, times).makespan


@settings(max_examples=12)
@given(st.data(), st.integers(1, 4), st.integers(1, 8))
def test_it_is_no_worse_than_zbv_at_any_cap(data: st.DataObject, ranks: int, microbatches: int) -> None:
    times = data.draw(st.lists(stage_times, min_size=2 * ranks, max_size=2 * ranks))
    _is_no_worse_than_zbv(ranks, microbatches, times, data.draw(st.integers(2, 2 * ranks + 4)), effort=500)


@pytest.mark.long
@settings(max_examples=60)
@given(st.data(), st.integers(2, 8), st.integers(1, 24))
def test_it_is_no_worse_than_zbv_at_any_cap_of_up_to_eight_ranks(
    data: st.DataObject, ranks: int, microbatches: int
) -> None:
    times = data.draw(st.lists(stage_times, min_size=2 * ranks, max_size=2 * ranks))
    _is_no_worse_than_zbv(ranks, microbatches, times, data.draw(st.integers(2, 2 * ranks + 4)), effort=20_000)
