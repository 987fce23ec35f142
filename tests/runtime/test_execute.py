"""Pipelines of small stages give the bits of one process, by any schedule and transport, and end together."""

import os
import signal
import threading
import time
from collections.abc import Callable

import pytest
import torch

from graphopt.errors import RankLostError, RankMismatchError
from graphopt.runtime.alarm import Alarm
from graphopt.schedules import NAMES, Action, Schedule, Work, live_bound, published
from tests.support.pipelines import Linear, along, sequential, world_peers
from tests.support.ranks import Ranks


def _schedules(ranks: int) -> list[Schedule]:
    """All that are published; with one, two and three stages a rank where they take any number."""
    found = [published(name, ranks, 2 * ranks) for name in NAMES]
    found += [published(name, ranks, 3 * ranks, 3) for name in ("interleaved", "breadth-first", "zero-bubble")]
    return [*found, published("1f1b", ranks, 1), published("zero-bubble", ranks, 2 * ranks, 1)]


def _all_schedules(
    rank: int, world: int, share_memory: bool
) -> list[dict[int, tuple[torch.Tensor, dict[int, float], int]]]:
    """By schedule and stage of this rank: the gradient, the losses, and the most microbatches that were alive."""
    alarm = Alarm.of_world()
    peers = world_peers(alarm, share_memory)
    chains = [along(schedule, peers, alarm) for schedule in _schedules(world)]
    return [{i: (stage.gradient, stage.losses, stage.most) for i, stage in chain.items()} for chain in chains]


@pytest.mark.parametrize("share_memory", [True, False])
@pytest.mark.parametrize("world", [2, 4])
def test_every_schedule_gives_the_bits_of_one_process(
    ranks: Callable[[int], Ranks], world: int, share_memory: bool
) -> None:
    everyone = ranks(world).run(_all_schedules, share_memory, timeout=60)
    for number, schedule in enumerate(_schedules(world)):
        found = {index: each for theirs in everyone for index, each in theirs[number].items()}
        assert sorted(found) == list(range(schedule.stages))
        for wanted, index in zip(sequential(schedule.stages, _orders(schedule)), sorted(found), strict=True):
            gradient, losses, _ = found[index]
            assert torch.equal(gradient, wanted.gradient), (schedule.name, index)
            assert losses == wanted.losses


def _orders(schedule: Schedule) -> list[list[int]]:
    """By stage, the order in which its microbatches' gradients of weights are added up."""
    adding = (Work.BACKWARD, Work.WEIGHT_GRADIENT)
    rows = [schedule.rows[rank] for rank in schedule.rank_of_stage]
    return [[a.microbatch for a in row if a.stage == stage and a.work in adding] for stage, row in enumerate(rows)]


@pytest.mark.parametrize("world", [2, 4])
def test_no_more_microbatches_are_alive_than_the_bound(ranks: Callable[[int], Ranks], world: int) -> None:
    everyone = ranks(world).run(_all_schedules, True, timeout=60)
    for number, schedule in enumerate(_schedules(world)):
        stages = schedule.stages // world
        bound = live_bound(schedule.name, world, schedule.microbatches, stages)
        for rank, theirs in enumerate(everyone):
            assert max(most for _, _, most in theirs[number].values()) <= bound[rank], schedule.name


def _in_flight(rank: int, world: int) -> int:
    """Segments that a rank has made after many steps of 1f1b."""
    alarm = Alarm.of_world()
    peers = world_peers(alarm, True)
    for _ in range(5):
        along(published("1f1b", world, 8), peers, alarm)
    return peers.links.segments  # type: ignore[attr-defined]


def test_messages_in_flight_are_few(ranks: Callable[[int], Ranks]) -> None:
    assert max(ranks(2).run(_in_flight)) <= 2 * 3, "of 40 messages, of two sizes: as many as a rank is ahead, and one"


class _Failing(Linear):
    """Raises, ends its process, or gives something else than it says, in the forward of microbatch 3."""

    fault = ""

    def forward(self, microbatch: int, received: list[torch.Tensor]) -> list[torch.Tensor]:
        given = super().forward(microbatch, received)
        if microbatch == 3 and self.fault == "raises":
            raise ValueError("no such token")
        if microbatch == 3 and self.fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        return [given[0][:1], *given[1:]] if microbatch == 3 and self.fault == "gives" else given


def _failing(rank: int, world: int, fault: str, share_memory: bool) -> tuple[str, list[str], float]:
    """What a step in which stage 2 fails raises, with its notes, and how long it takes."""
    alarm = Alarm.of_world()
    peers = world_peers(alarm, share_memory)
    made = type("Failing", (_Failing,), {"fault": fault}) if rank == 2 else Linear
    started, threads = time.monotonic(), threading.active_count()
    with pytest.raises((ValueError, RankLostError, RankMismatchError)) as caught:
        along(published("1f1b", world, 8), peers, alarm, made)
    with pytest.raises(RankLostError):
        along(published("1f1b", world, 8), peers, alarm)
    assert threading.active_count() == threads, "one that is left in gloo ends the process badly"
    return str(caught.value), getattr(caught.value, "__notes__", []), time.monotonic() - started


def _check(found: list[tuple[str, list[str], float]], fault: str) -> None:
    said, notes, _ = found[2]
    moment = "stage 2, forward of microbatch 3"
    if fault == "raises":
        assert said == "no such token"
        told = f"rank 2: {moment}: ValueError: no such token"
    else:
        assert said.startswith(
            "stage 2 gives values float32 [1, 6], bool [4, 6], int64 [0, 2] of microbatch 3 where it"
        )
        told = f"rank 2: {moment}: {said}"
    assert notes == [f"in {moment}"]
    assert [found[rank][0] for rank in (0, 1, 3)] == [told] * 3
    assert max(seconds for _, _, seconds in found) < 10


@pytest.mark.parametrize("fault", ["raises", "gives"])
def test_what_a_stage_raises_ends_all_ranks(ranks: Callable[[int], Ranks], fault: str) -> None:
    _check(ranks(4).run(_failing, fault, True, timeout=60), fault)


def test_what_a_stage_raises_ends_all_ranks_that_wait_by_sockets() -> None:
    ranks = Ranks(4)  # of their own: threads still wait in their group
    try:
        _check(ranks.run(_failing, "raises", False, timeout=60), "raises")
    finally:
        ranks.close()


@pytest.mark.parametrize("share_memory", [True, False])
def test_a_rank_that_is_killed_ends_the_others(share_memory: bool) -> None:
    ranks = Ranks(4)  # of their own: one ends
    try:
        found = ranks.run(_failing, "killed", share_memory, timeout=40, lost=[2])
    finally:
        ranks.close()
    assert all("rank 2 has ended" in said for said, _, _ in found)
    assert max(seconds for _, _, seconds in found) < 10


def test_a_pipeline_of_one_rank_hands_over(ranks: Callable[[int], Ranks]) -> None:
    rows = tuple(Action(s, Work.FORWARD, m) for m in range(2) for s in range(2))
    back = tuple(Action(s, Work.BACKWARD, m) for m in range(2) for s in (1, 0))
    schedule = Schedule("given", 2, (0, 0), (rows + back,))
    ((chain, wanted),) = ranks(1).run(_alone, schedule)
    assert all(torch.equal(a, b) for a, b in zip(chain, wanted, strict=True))


def _alone(rank: int, world: int, schedule: Schedule) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    alarm = Alarm.of_world()
    chain = along(schedule, world_peers(alarm, True), alarm)
    return [chain[s].gradient for s in range(2)], [s.gradient for s in sequential(2, [[0, 1]] * 2)]
