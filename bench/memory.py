"""The memory model beside runs: predicted and measured peaks by model, size, ZeRO stage, rematerialization, offload."""

import itertools
import os
import pickle
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from tqdm import tqdm

from bench.live import most_alive, most_allocated
from bench.models import DIMENSIONS, MODELS

STAGES = (0, 1, 2, 3)
POLICIES = (None, "full", "selective")
PLACES = (None, "disk")
WORLD = 2


@dataclass(frozen=True)
class Case:
    """What is compiled and run; remat: the policy of the plan, or None; offload: where saved values are, or None."""

    model: str
    size: str
    stage: int
    remat: str | None
    offload: str | None = None

    @property
    def plan(self) -> str:
        remat = f",remat={self.remat}" if self.remat else ""
        offload = f",offload={self.offload},offload.least_bytes=4KiB" if self.offload else ""
        return f"zero={self.stage},zero.whole_below=0,transport=group,verify=false{remat}{offload}"


@dataclass(frozen=True)
class Peak:
    """Bytes on a rank. allocated: with the workspace of operators, on one rank; None where it is not measured."""

    predicted: int
    measured: int
    allocated: int | None = None

    @property
    def deviation(self) -> float:
        """How far the prediction lies above what was measured, as a share of that; negative below."""
        return self.predicted / self.measured - 1


def cases(
    models: list[str],
    sizes: list[str],
    stages: list[int],
    policies: list[str | None],
    places: Sequence[str | None] = (None,),
) -> Iterator[Case]:
    for model, size, stage, remat, offload in itertools.product(models, sizes, stages, policies, places):
        yield Case(model, size, stage, remat, offload)


def peak_on_this_rank(case: Case, world: int) -> Peak:
    """Compile and run a case; all ranks call this together."""
    import graphopt

    torch.manual_seed(dist.get_rank() if world > 1 else 0)
    kind, dimensions = MODELS[case.model], DIMENSIONS[case.size]
    model, batch = graphopt.compile(kind.build(dimensions).train(), case.plan), kind.batch(dimensions)
    measured = most_alive(model, batch, waits=world > 1)
    allocated = most_allocated(model, batch) if world == 1 else None
    return Peak(graphopt.report(model).memory.peak_bytes, measured, allocated)


def measure(found: list[Case], world: int = WORLD) -> list[Peak]:
    """The peak of each case on the rank whose prediction is farthest off, in `world` processes.

    Raises ProcessRaisedException with the traceback of a rank that failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_rank, (world, folder, found), nprocs=world)
        ranks = [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(world)]
    return [max(peaks, key=lambda peak: abs(peak.deviation)) for peaks in zip(*ranks, strict=True)]


def _rank(rank: int, world: int, folder: str, found: list[Case]) -> None:
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    peaks = [peak_on_this_rank(case, world) for case in tqdm(found, desc="cases", disable=rank > 0)]
    (Path(folder) / str(rank)).write_bytes(pickle.dumps(peaks))
    if world > 1:
        dist.barrier()
    os._exit(0)  # gloo's threads may outlive their group


def accuracy(
    models: list[str],
    sizes: list[str],
    stages: list[int],
    policies: list[str | None],
    places: Sequence[str | None] = PLACES,
) -> dict[str, Any]:
    """Peaks on two ranks, and beside what the allocator sees on one; each model in processes of its own."""
    ranks: list[dict[str, Any]] = []
    workspace: list[dict[str, Any]] = []
    for model in models:
        found = list(cases([model], sizes, stages, policies, places))
        ranks += _rows(found, measure(found))
        alone = list(cases([model], sizes, [0], [None]))
        workspace += _rows(alone, measure(alone, 1))
    deviations = [row["deviation"] for row in ranks]
    return {"ranks": ranks, "workspace": workspace, "lowest": min(deviations), "highest": max(deviations)}


def _rows(found: list[Case], peaks: list[Peak]) -> list[dict[str, Any]]:
    """Plain values, a row a case."""
    return [
        {**asdict(case), **asdict(peak), "deviation": peak.deviation} for case, peak in zip(found, peaks, strict=True)
    ]
