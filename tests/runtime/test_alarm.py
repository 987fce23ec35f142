"""A copy that fails on one rank is an error of all of them, which says what and where; none waits for long."""

import re
import resource
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import graphopt
from graphopt import Offload, Plan, Zero
from graphopt.errors import OffloadError
from graphopt.runtime.alarm import Alarm
from tests.support.ranks import Ranks

ROWS, WIDTH = 4096, 64
LIMIT = 2 * ROWS * WIDTH  # half a value, and much more than the file through which the ranks meet has


def _failing(rank: int, world: int, folder: str, transport: str, fault: str) -> tuple[list[str], float]:
    """What the second step and a third raise, rank 1 having lost its files or the room for them; how long both take."""
    model = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(3)))
    plan = Plan(zero=Zero(3, whole_below=0), offload=Offload("disk", 0, folder), transport=transport)
    model = graphopt.compile(model, plan)
    x = torch.randn(ROWS, WIDTH)
    model(x).sum().backward()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1 and fault == "full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, limit[1]))
    said, started = [], time.monotonic()
    for _ in range(2):
        with pytest.raises(OffloadError) as caught:
            loss = model(x).sum()
            if rank == 1:
                for file in Path(folder).glob("rank1-*/*.tensor"):
                    file.unlink()
            loss.backward()
        said.append(str(caught.value))
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    return said, time.monotonic() - started


FAULTS = {
    "full": "saving {value} for backward: cannot write {file}: File too large",
    "lost": "getting {value} back for backward: cannot read {file}: No such file or directory",
}


def _check(found: list[tuple[list[str], float]], folder: Path, fault: str) -> None:
    (others, waited), (own, took) = found
    file = rf"'value-\d' \w+ {re.escape(str(folder))}/rank1-\w+/value-\d\.tensor"
    assert re.fullmatch("call 2 of the model: " + FAULTS[fault].format(value=r"\w+", file=file), own[0])
    assert own[1] == f"rank 1: {own[0]}" and others == [own[1]] * 2
    assert max(waited, took) < 10, "seconds"


@pytest.mark.parametrize("fault", FAULTS)
def test_what_fails_on_one_rank_stops_all(ranks: Callable[[int], Ranks], tmp_path: Path, fault: str) -> None:
    _check(ranks(2).run(_failing, str(tmp_path), "auto", fault, timeout=60), tmp_path, fault)


def test_what_fails_on_one_rank_stops_all_that_wait_for_it_by_sockets(tmp_path: Path) -> None:
    ranks = Ranks(2)  # of their own: afterwards what their group exchanges does not fit together
    try:
        _check(ranks.run(_failing, str(tmp_path), "group", "lost", timeout=60), tmp_path, "lost")
    finally:
        ranks.close()


class _LostStore:
    """One whose server has ended."""

    def add(self, key: str, number: int) -> int:
        return number

    def compare_set(self, key: str, expected: str, value: str) -> bytes:
        raise dist.DistStoreError("connection lost")


def test_who_cannot_tell_the_others_does_not_run_again_either() -> None:
    alarm = Alarm(_LostStore(), 0, 2)  # type: ignore[arg-type]
    for call in "first", "second":
        with pytest.raises(OffloadError, match="first call: no room"), alarm.watching(f"{call} call"):
            raise OffloadError("no room")
    with pytest.raises(OffloadError, match="first call: no room"), alarm.watching("third call"):
        raise AssertionError("it runs, out of step with the others")
