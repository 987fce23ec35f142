"""Messages between ranks: each value crosses once, in one order on both sides, and nothing waits for ever."""

from collections import Counter

from hypothesis import given

from graphopt.schedules import Compute, Receive, Schedule, Send, Step, Work, steps
from tests.schedules.cases import published_schedules

Message = tuple[int, int, int, bool]


def _message(step: Send | Receive) -> Message:
    """The stage that gives, the stage that takes, the microbatch, whether it is a gradient."""
    ends = (step.stage, step.other_stage) if isinstance(step, Send) else (step.other_stage, step.stage)
    return (*ends, step.microbatch, step.gradient)


def _between(schedule: Schedule, row: tuple[Step, ...], other: int) -> list[Message]:
    messages = (step for step in row if isinstance(step, Send | Receive))
    return [_message(step) for step in messages if schedule.rank_of_stage[step.other_stage] == other]


@given(published_schedules())
def test_computations_keep_their_order(schedule: Schedule) -> None:
    for row, found in zip(schedule.rows, steps(schedule), strict=True):
        assert tuple(step.action for step in found if isinstance(step, Compute)) == row


@given(published_schedules())
def test_two_ranks_agree_on_the_order_of_their_messages(schedule: Schedule) -> None:
    rows = steps(schedule)
    for one, row in enumerate(rows):
        for other in range(one):
            assert _between(schedule, row, other) == _between(schedule, rows[other], one)


@given(published_schedules())
def test_every_value_crosses_once_where_stages_are_on_two_ranks(schedule: Schedule) -> None:
    expected = Counter(
        ends
        for stage in range(schedule.stages - 1)
        if schedule.rank_of_stage[stage] != schedule.rank_of_stage[stage + 1]
        for microbatch in range(schedule.microbatches)
        for ends in ((stage, stage + 1, microbatch, False), (stage + 1, stage, microbatch, True))
    )
    found = [step for row in steps(schedule) for step in row]
    assert Counter(_message(step) for step in found if isinstance(step, Send)) == expected
    assert Counter(_message(step) for step in found if isinstance(step, Receive)) == expected


@given(published_schedules())
def test_it_ends_where_each_send_waits_for_its_receive(schedule: Schedule) -> None:
    """And what is computed or sent is there by then."""
    rows = [list(row) for row in steps(schedule)]
    there: set[tuple[int, int, bool]] = set()  # stage, microbatch, whether its backward can run; else its forward
    done: set[tuple[int, int, bool]] = set()
    advanced = True
    while advanced:
        advanced = False
        for row in rows:
            if row and isinstance(step := row[0], Compute):
                _compute(schedule, step, there, done)
                row.pop(0)
                advanced = True
            elif row and isinstance(step, Send):
                assert (step.stage, step.microbatch, step.gradient) in done
                other = rows[schedule.rank_of_stage[step.other_stage]]
                if other and isinstance(other[0], Receive) and _message(other[0]) == _message(step):
                    there.add((step.other_stage, step.microbatch, step.gradient))
                    row.pop(0), other.pop(0)
                    advanced = True
    assert not any(rows)


def _compute(
    schedule: Schedule, step: Compute, there: set[tuple[int, int, bool]], done: set[tuple[int, int, bool]]
) -> None:
    action = step.action
    stage, microbatch, backward = action.stage, action.microbatch, action.work is not Work.FORWARD
    if action.work is Work.WEIGHT_GRADIENT:
        assert (stage, microbatch, True) in done
        return
    before = stage + 1 if backward else stage - 1
    if before in range(schedule.stages):
        on_this_rank = schedule.rank_of_stage[before] == schedule.rank_of_stage[stage]
        assert (before, microbatch, backward) in done if on_this_rank else (stage, microbatch, backward) in there
    done.add((stage, microbatch, backward))


def test_a_receive_stands_before_the_computation_that_its_message_travels_beside() -> None:
    schedule = Schedule.from_text("0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1\n")
    first, second = (" ".join(map(str, row)) for row in steps(schedule))
    assert first == "0F0 0>1x0 0F1 0>1x1 0<1g0 0B0 0<1g1 0B1"
    assert second == "1<0x0 1<0x1 1F0 1B0 1>0g0 1F1 1B1 1>0g1"


def test_stages_on_one_rank_exchange_nothing() -> None:
    (row,) = steps(Schedule.from_text("0F0,1F0,1B0,0B0\n"))
    assert [str(step) for step in row] == ["0F0", "1F0", "1B0", "0B0"]
