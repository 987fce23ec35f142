"""What a schedule is: its text, and what makes it one."""

import pytest
from hypothesis import given

from graphopt.errors import PlanError
from graphopt.schedules import Action, Schedule, Work, check
from tests.schedules.cases import published_schedules


def test_an_action_prints_as_torch_prints_it() -> None:
    assert str(Action(2, Work.FORWARD, 0)) == "2F0"
    assert Action.parse("12W34") == Action(12, Work.WEIGHT_GRADIENT, 34)


@pytest.mark.parametrize("text", ["", "F0", "2F", "2X0", "2F0 ", "0REDUCE_GRAD"])
def test_what_is_no_action_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match="is no action"):
        Action.parse(text)


@given(published_schedules())
def test_text_leads_back(schedule: Schedule) -> None:
    assert Schedule.from_text(schedule.to_text(), schedule.name) == schedule


def test_empty_cells_are_skipped_and_overlapped_pairs_are_two() -> None:
    schedule = Schedule.from_text("0F0,,(0F1;0B0)OVERLAP_F_B, 0B1\n")
    assert schedule.to_text() == "0F0,0F1,0B0,0B1\n"
    assert (schedule.ranks, schedule.stages, schedule.microbatches) == (1, 1, 2)
    assert not schedule.splits_backward and schedule.stages_of(0) == (0,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "0F0,0B0,0F1,0B1\n1F1,1B1,1F0,1B0\n",
            "never ends: rank 0 waits at 0B0 for 1B0 of rank 1; rank 1 waits at 1F1 for",
        ),
        ("0B0,0F0\n", "never ends: rank 0 waits at 0B0 for 0F0 of rank 0"),
        ("0F0,0B0\n1F0\n", "rank 1 has 1F0 for stage 1 and microbatch 0"),
        ("0F0,0I0\n", "rank 0 has 0F0, 0I0 for stage 0"),
        ("0F0,0B0,0B0\n", "0F0, 0B0, 0B0 for stage 0"),
        ("0F0,0F2,0B0,0B2\n", "rank 0 has nothing for stage 0 and microbatch 1"),
        ("0F0,0B0\n2F0,2B0\n", "no action of stage 1"),
        ("0F0,0B0,1F0\n1B0\n", "rank 0 has 1F0, but stage 1 is on rank 1"),
        ("", "of 0 microbatches"),
    ],
)
def test_what_is_no_schedule_is_refused(text: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Schedule.from_text(text)


def test_stages_and_rows_belong_together() -> None:
    row = (Action(0, Work.FORWARD, 0), Action(0, Work.BACKWARD, 0))
    with pytest.raises(PlanError, match="rank 1 has no stage"):
        check(Schedule("given", 1, (0,), (row, ())))
    with pytest.raises(PlanError, match="puts a stage on rank 1, but has rows up to rank 0"):
        check(Schedule("given", 1, (0, 1), (row,)))
    with pytest.raises(PlanError, match="rank 0 has 3F0; the last stage is 0"):
        check(Schedule("given", 1, (0,), ((*row, Action(3, Work.FORWARD, 0)),)))


@given(published_schedules())
def test_a_schedule_without_one_action_is_none(schedule: Schedule) -> None:
    rows = (schedule.rows[0][:-1], *schedule.rows[1:])
    with pytest.raises(PlanError, match="rank 0 has"):
        check(Schedule(schedule.name, schedule.microbatches, schedule.rank_of_stage, rows))
