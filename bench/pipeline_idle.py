"""The bubble of pipelines whose stages sleep for a known time, beside that of the simulator."""

import pickle
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from tqdm import tqdm

from bench.statistics import spread
from graphopt.runtime.alarm import Alarm
from graphopt.runtime.execute import run
from graphopt.runtime.messages import TensorSpec
from graphopt.runtime.peers import peers_of
from graphopt.schedules import NAMES, Schedule, StageTimes, published, simulate, steps

MICROBATCHES_PER_RANK = 4
Measured = tuple[float, float, float]  # when a rank started and ended, and how long it was in its stages, in seconds


def idle_fractions(worlds: Sequence[int], unit: float, elements: int, rounds: int) -> list[dict[str, Any]]:
    """Each published schedule on so many ranks, `rounds` times, the schedules in turn.

    unit: seconds of a stage's forward, and of either half of its backward, where a rank has one stage; those of several
    share it. elements: float32 that cross between stages. A rank is idle while it is in none of its stages, from the
    first start of any rank to the last end.
    """
    found = []
    for world in worlds:
        with tempfile.TemporaryDirectory() as folder:
            multiprocessing.spawn(_rank, (world, folder, unit, elements, rounds), nprocs=world)
            by_rank = [pickle.loads((Path(folder) / f"rank{rank}").read_bytes()) for rank in range(world)]
        found += [
            compared(schedule, unit, theirs) for schedule, *theirs in zip(_schedules(world), *by_rank, strict=True)
        ]
    return found


def _schedules(world: int) -> list[Schedule]:
    return [published(name, world, MICROBATCHES_PER_RANK * world) for name in NAMES]


def stage_seconds(schedule: Schedule, unit: float) -> float:
    """Of a stage's forward, and of either half of its backward."""
    return unit * schedule.ranks / schedule.stages


def compared(schedule: Schedule, unit: float, by_rank: Sequence[Sequence[Measured]]) -> dict[str, Any]:
    """What the ranks measured, round by round, beside what the simulator says."""
    each = stage_seconds(schedule, unit)
    simulated = simulate(schedule, [StageTimes(each, each, each)] * schedule.stages)
    idle, makespans = [], []
    for ranks in zip(*by_rank, strict=True):
        makespans.append(max(end for _, end, _ in ranks) - min(start for start, _, _ in ranks))
        idle.append(1 - sum(busy for _, _, busy in ranks) / (makespans[-1] * schedule.ranks))
    return {
        "schedule": schedule.name,
        "ranks": schedule.ranks,
        "stages": schedule.stages,
        "microbatches": schedule.microbatches,
        "simulated_idle": simulated.idle_fraction,
        "idle": asdict(spread(idle)),
        "ratio": asdict(spread([fraction / simulated.idle_fraction for fraction in idle])),
        "makespan_ratio": asdict(spread([seconds / simulated.makespan for seconds in makespans])),
    }


class _Sleeping:
    """A stage that takes a known time for everything. busy: seconds that it took."""

    def __init__(self, seconds: float, elements: int) -> None:
        self.busy = 0.0
        self._seconds = seconds
        self._value = torch.zeros(elements)

    def forward(self, microbatch: int, received: list[torch.Tensor]) -> list[torch.Tensor]:
        self._sleep(1)
        return [self._value]

    def backward(self, microbatch: int, gradients: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
        self._sleep(2)
        return [self._value]

    def input_gradients(self, microbatch: int, gradients: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
        self._sleep(1)
        return [self._value]

    def weight_gradients(self, microbatch: int) -> None:
        self._sleep(1)

    def incoming(self, microbatch: int) -> list[TensorSpec]:
        return [TensorSpec.of(self._value)]

    def outgoing(self, microbatch: int) -> list[TensorSpec]:
        return [TensorSpec.of(self._value)]

    def incoming_gradients(self, microbatch: int) -> list[bool]:
        return [True]

    def outgoing_gradients(self, microbatch: int) -> list[bool]:
        return [True]

    def _sleep(self, times: int) -> None:
        started = time.monotonic()
        time.sleep(times * self._seconds)
        self.busy += time.monotonic() - started


def _rank(rank: int, world: int, folder: str, unit: float, elements: int, rounds: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    found = measured(_schedules(world), unit, elements, rounds)
    (Path(folder) / f"rank{rank}").write_bytes(pickle.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def measured(schedules: Sequence[Schedule], unit: float, elements: int, rounds: int) -> list[list[Measured]]:
    """By schedule and round: this rank's part of it. All ranks of the default group call this together."""
    assert dist.group.WORLD is not None
    rank, alarm = dist.get_rank(), Alarm.of_world()
    peers = peers_of(dist.group.WORLD, torch.device("cpu"), alarm.look)
    parts = [steps(schedule)[rank] for schedule in schedules]
    found: list[list[Measured]] = [[] for _ in schedules]
    for turn in tqdm(range(rounds + 1), desc=f"rounds on {dist.get_world_size()} ranks", disable=rank > 0):
        for schedule, part, times in zip(schedules, parts, found, strict=True):
            seconds = stage_seconds(schedule, unit) if turn else 0.0  # the first round fills the segments
            stages = {index: _Sleeping(seconds, elements) for index in schedule.stages_of(rank)}
            dist.barrier()
            started = time.monotonic()
            run(part, stages, schedule.rank_of_stage, peers, alarm)
            if turn:
                times.append((started, time.monotonic(), sum(stage.busy for stage in stages.values())))
    return found
