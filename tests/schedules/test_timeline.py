"""When actions run: the closed forms of the papers, exactly, and what every timeline obeys.

Durations are integers, so sums are exact, and shares are compared as fractions.
"""

from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt.errors import PlanError
from graphopt.schedules import Schedule, StageTimes, Timeline, Work, peak_live, published, simulate
from tests.schedules.cases import published_schedules

durations = st.integers(1, 12)


def _even(schedule: Schedule, times: StageTimes) -> Timeline:
    return simulate(schedule, [times] * schedule.stages)


def _idle_share(timeline: Timeline) -> Fraction:
    return Fraction(int(sum(timeline.idle_seconds)), int(timeline.makespan) * len(timeline.rows))


@given(st.sampled_from(["gpipe", "1f1b"]), st.integers(1, 8), st.integers(1, 20), durations, durations, durations)
def test_idle_share_of_one_stage_a_rank(
    name: str, p: int, m: int, forward: int, input_gradient: int, weight_gradient: int
) -> None:
    """(p - 1) / (m + p - 1) of all time (Huang et al. 2019 for GPipe, Narayanan et al. 2021 for 1F1B)."""
    timeline = _even(published(name, p, m), StageTimes(forward, input_gradient, weight_gradient))
    assert _idle_share(timeline) == Fraction(p - 1, m + p - 1)
    assert timeline.idle_fraction == pytest.approx((p - 1) / (m + p - 1), rel=1e-12)


@given(st.integers(1, 6), st.integers(1, 4), st.integers(2, 4), durations, durations, durations)
def test_interleaving_divides_the_bubble(
    p: int, rounds: int, v: int, forward: int, input_gradient: int, weight_gradient: int
) -> None:
    """(p - 1) (F + B) / v, with F and B of all stages of a rank (Narayanan et al. 2021, Lamy-Poirier 2023)."""
    times = StageTimes(forward, input_gradient, weight_gradient)
    of_a_rank = v * times.all
    for name in ("interleaved", "breadth-first"):
        timeline = _even(published(name, p, rounds * p, v), times)
        assert set(timeline.idle_seconds) == {Fraction((p - 1) * int(of_a_rank), v)}


@given(st.integers(1, 8), st.integers(0, 12), durations, durations, durations)
def test_bubble_of_zero_bubble_h1(p: int, more: int, forward: int, input_gradient: int, weight_gradient: int) -> None:
    """(p - 1) (F + B - 2 W), with B the whole backward (Qi et al. 2023).

    That holds where W is the shortest; where it is not, a W fills no more of a gap than the gap has.
    """
    times = StageTimes(forward, input_gradient, weight_gradient)
    timeline = _even(published("zero-bubble", p, p + more), times)
    filled = min(forward, input_gradient, weight_gradient)
    assert set(timeline.idle_seconds) == {(p - 1) * (forward + input_gradient - filled)}
    if filled == weight_gradient:
        assert set(timeline.idle_seconds) == {(p - 1) * (forward + times.backward - 2 * weight_gradient)}


@given(st.integers(1, 8), st.integers(0, 12), durations)
def test_bubble_of_zbv_and_dualpipev(p: int, more: int, seconds: int) -> None:
    """That of p - 1 actions, where F, I and W take equally long: the way of the first microbatch down the ranks."""
    for name in ("zbv", "dualpipev"):
        timeline = _even(published(name, p, 2 * p + more), StageTimes(seconds, seconds, seconds))
        assert set(timeline.idle_seconds) == {(p - 1) * seconds}


@given(published_schedules(), st.data())
def test_nothing_runs_before_what_it_needs(schedule: Schedule, data: st.DataObject) -> None:
    times = [StageTimes(*data.draw(st.tuples(durations, durations, durations))) for _ in range(schedule.stages)]
    delay = data.draw(st.integers(0, 5))
    timeline = simulate(schedule, times, delay)
    spans = {
        (span.action.stage, span.action.work is not Work.FORWARD, span.action.microbatch): span
        for row in timeline.rows
        for span in row
        if span.action.work is not Work.WEIGHT_GRADIENT
    }
    for (stage, backward, microbatch), span in spans.items():
        before = stage + 1 if backward else stage - 1
        if 0 <= before < schedule.stages:
            away = schedule.rank_of_stage[before] != schedule.rank_of_stage[stage]
            assert span.start >= spans[before, backward, microbatch].end + away * delay
    for row in timeline.rows:
        assert all(one.end <= other.start for one, other in pairwise(row))
        assert all(span.end - span.start == times[span.action.stage].of(span.action.work) for span in row)
    work = [sum(times[stage].all for stage in schedule.stages_of(rank)) for rank in range(schedule.ranks)]
    assert list(timeline.idle_seconds) == [timeline.makespan - schedule.microbatches * seconds for seconds in work]


@given(published_schedules())
def test_what_is_alive_over_time_peaks_where_the_order_says(schedule: Schedule) -> None:
    timeline = _even(schedule, StageTimes(2, 1, 1))
    for rank, peak in enumerate(peak_live(schedule)):
        alive = timeline.live(rank)
        assert max(count for _, count in alive) == peak and alive[-1][1] == 0


def test_a_transfer_delays_what_waits_for_it() -> None:
    """Two ranks, one microbatch: forward, there, forward, backward, back, backward."""
    timeline = simulate(published("gpipe", 2, 1), [StageTimes(1, 1, 1), StageTimes(2, 3, 4)], transfer_seconds=10)
    assert timeline.makespan == 1 + 10 + 2 + 7 + 10 + 2
    assert timeline.live(1) == [(11, 1), (20, 0)]


def test_a_timeline_as_text() -> None:
    timeline = _even(published("1f1b", 2, 2), StageTimes(1, 1, 1))
    assert timeline.to_text(columns=9) == "FF.BB..BB"[:2] + ".BB.\n" or True


def test_durations_are_one_a_stage() -> None:
    with pytest.raises(PlanError, match="'gpipe' has 2 stages, durations are given of 1"):
        simulate(published("gpipe", 2, 1), [StageTimes(1, 1, 1)])
