"""The published schedules: what torch's own classes give, and what holds of all of them."""

import types

import pytest
import torch
from hypothesis import given
from torch.distributed import pipelining

from graphopt.errors import PlanError
from graphopt.schedules import Schedule, Work, check, live_bound, peak_live, published
from tests.schedules.cases import published_schedules


def _of_torch(kind: type, ranks: int, microbatches: int, stages: list[int]) -> Schedule:
    """The order of one of torch's schedules, asked with what its constructor reads of the stages of rank 0."""
    last = ranks * len(stages) - 1
    there = [
        types.SimpleNamespace(
            stage_index=stage,
            num_stages=last + 1,
            group_size=ranks,
            group_rank=0,
            is_first=stage == 0,
            is_last=stage == last,
            has_backward=True,
            submod=torch.nn.Identity(),
        )
        for stage in stages
    ]
    order = kind(there, microbatches).pipeline_order
    rows = (",".join("" if action is None else str(action) for action in order[rank]) for rank in range(ranks))
    return Schedule.from_text("\n".join(rows))


NUMBERS = [
    (1, 1),
    (1, 3),
    (2, 2),
    (2, 4),
    (2, 7),
    (3, 1),
    (3, 4),
    (3, 6),
    (4, 3),
    (4, 8),
    (4, 10),
    (4, 12),
    (6, 12),
    (8, 16),
]


@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize(("ranks", "microbatches"), [each for each in NUMBERS if each != (2, 7)])
def test_interleaved_schedules_are_those_of_torch(ranks: int, microbatches: int, stages: int) -> None:
    looped = [ranks * turn for turn in range(stages)]
    for name, kind in (
        ("interleaved", pipelining.ScheduleInterleaved1F1B),
        ("zero-bubble", pipelining.ScheduleInterleavedZeroBubble),
    ):
        found = published(name, ranks, microbatches, stages)
        assert found.rows == _of_torch(kind, ranks, microbatches, looped).rows


@pytest.mark.parametrize(("ranks", "microbatches"), NUMBERS)
def test_bent_schedules_are_those_of_torch(ranks: int, microbatches: int) -> None:
    bent = [0, 2 * ranks - 1]
    theirs = _of_torch(pipelining.ScheduleZBVZeroBubble, ranks, microbatches, bent)
    assert published("zbv", ranks, microbatches).rows == theirs.rows
    if microbatches >= 2 * ranks:
        theirs = _of_torch(pipelining.ScheduleDualPipeV, ranks, microbatches, bent)
        assert published("dualpipev", ranks, microbatches).rows == theirs.rows


@pytest.mark.parametrize(("ranks", "microbatches"), NUMBERS)
def test_breadth_first_differs_from_torch_in_the_order_of_backwards_alone(ranks: int, microbatches: int) -> None:
    theirs = _of_torch(pipelining.ScheduleLoopedBFS, ranks, microbatches, [0, ranks])
    for row, other in zip(published("breadth-first", ranks, microbatches).rows, theirs.rows, strict=True):
        half = 2 * microbatches
        assert row[:half] == other[:half]
        assert [action.stage for action in row[half:]] == [action.stage for action in other[half:]]


def test_one_forward_one_backward_as_it_is_drawn() -> None:
    """Narayanan et al. 2021, figure 4: PipeDream-Flush of 4 ranks, here for 5 microbatches."""
    assert published("1f1b", 4, 5).to_text().splitlines() == [
        "0F0,0F1,0F2,0F3,0B0,0F4,0B1,0B2,0B3,0B4",
        "1F0,1F1,1F2,1B0,1F3,1B1,1F4,1B2,1B3,1B4",
        "2F0,2F1,2B0,2F2,2B1,2F3,2B2,2F4,2B3,2B4",
        "3F0,3B0,3F1,3B1,3F2,3B2,3F3,3B3,3F4,3B4",
    ]


@given(published_schedules())
def test_each_is_a_schedule_within_its_bound(schedule: Schedule) -> None:
    check(schedule)
    stages_per_rank = schedule.stages // schedule.ranks
    bound = live_bound(schedule.name, schedule.ranks, schedule.microbatches, stages_per_rank)
    peak = peak_live(schedule)
    assert all(found <= most for found, most in zip(peak, bound, strict=True))
    if schedule.name != "zbv" or schedule.microbatches >= 2 * schedule.ranks:
        assert peak == bound


@given(published_schedules())
def test_gradients_of_weights_are_summed_in_the_order_of_microbatches(schedule: Schedule) -> None:
    for stage, rank in enumerate(schedule.rank_of_stage):
        found = [
            action.microbatch
            for action in schedule.rows[rank]
            if action.stage == stage and action.work in (Work.BACKWARD, Work.WEIGHT_GRADIENT)
        ]
        assert found == list(range(schedule.microbatches))


def test_what_each_keeps_alive() -> None:
    assert peak_live(published("gpipe", 4, 8)) == (8, 8, 8, 8)
    assert peak_live(published("1f1b", 4, 8)) == (4, 3, 2, 1)
    assert peak_live(published("zero-bubble", 4, 8)) == (4, 4, 4, 4)
    assert peak_live(published("zbv", 4, 8)) == (8, 8, 8, 8)
    assert peak_live(Schedule.from_text("0F0,0F1,1F0,1I0,0B0,1F1,1W0,1B1,0B1\n"), sizes=[10, 1]) == (21,)
    with pytest.raises(PlanError, match="has 4 stages, sizes are given of 1"):
        peak_live(published("zbv", 2, 4), sizes=[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("zbw", 2, 4), "no schedule is called 'zbw'; the nearest is 'zbv'"),
        (("zbv", 2, 4, 3), "'zbv' has no form with 3 stages a rank; the nearest number is 2"),
        (("interleaved", 2, 4, 1), "'interleaved' has no form with 1 stages a rank; the nearest number is 2"),
        (("1f1b", 2, 4, 2), "'1f1b' has no form with 2 stages a rank; the nearest number is 1"),
        (("interleaved", 4, 9), "9 make none; the nearest number is 8"),
        (("zero-bubble", 3, 32, 2), "32 make none; the nearest number is 33"),
        (("dualpipev", 4, 7), "as many microbatches as stages: 8, not 7; 'zbv' takes any number"),
        (("gpipe", 0, 4), "'gpipe' on 0 ranks for 4 microbatches: the least is 1 of each"),
        (("gpipe", 4, 0), "'gpipe' on 4 ranks for 0 microbatches: the least is 1 of each"),
    ],
)
def test_numbers_without_a_form_are_refused_with_the_nearest(arguments: tuple[str, int, int], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        published(*arguments)


def test_a_bound_of_no_schedule_is_refused() -> None:
    with pytest.raises(PlanError, match="the nearest is '1f1b'"):
        live_bound("1f2b", 2, 4, 1)
