"""Step times of all rivals, interleaved in one run: round after round, a few steps of each."""

import os
import pickle
import socket
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import nn
from tqdm import tqdm

from bench.rivals import Step, make_rival
from bench.statistics import paired_ratios, spread
from bench.workloads import llama, tokens


@dataclass(frozen=True)
class Contest:
    """What rivals are compared on; functions of modules, by which other processes find them.

    model: the same weights at every call. make: the training step of the rival of a name. batch: ids, by step and rank.
    """

    model: Callable[[], nn.Module]
    make: Callable[[str, nn.Module], Step]
    batch: Callable[[int, int], torch.Tensor]


DATA_PARALLEL = Contest(llama, make_rival, tokens)


def measure(contest: Contest, rivals: list[str], world: int, rounds: int, steps: int) -> dict[str, Any]:
    """Run all rivals in the same `world` processes.

    Each round runs `steps` + 1 steps of every rival in turn; the first of a turn warms the caches and is not counted.
    Raises ProcessRaisedException with the traceback of a rank that failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result"
        multiprocessing.spawn(_rank, (world, _free_port(), contest, rivals, rounds, steps, result), nprocs=world)
        return pickle.loads(result.read_bytes())  # type: ignore[no-any-return]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _rank(
    rank: int, world: int, port: int, contest: Contest, rivals: list[str], rounds: int, steps: int, result: Path
) -> None:
    cores = sorted(os.sched_getaffinity(0))
    if world <= len(cores):
        os.sched_setaffinity(0, {cores[rank]})
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)  # torch warns of its own use of names that it gave up
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    dist.init_process_group("gloo")
    ready, missing = _prepare(contest, rivals, rank)
    times: dict[str, list[list[float]]] = {name: [] for name in ready}
    losses: dict[str, list[float]] = {name: [] for name in ready}
    for turn in tqdm(range(rounds + 1), desc="rounds", disable=rank > 0):
        batches = [contest.batch(turn * (steps + 1) + index + 1, rank) for index in range(steps + 1)]
        for name, step in ready.items():
            taken = _turn(step, batches, losses[name])
            if turn:
                times[name].append(taken)
    if rank == 0:
        result.write_bytes(pickle.dumps(_result(times, losses, missing)))
    dist.barrier()
    os._exit(0)  # some rivals leave threads that outlive their group


def _prepare(contest: Contest, rivals: list[str], rank: int) -> tuple[dict[str, Step], dict[str, str]]:
    """Those that can be built on every rank, and why the others cannot."""
    ready: dict[str, Step] = {}
    missing: dict[str, str] = {}
    for name in tqdm(rivals, desc="first steps", disable=rank > 0):
        try:
            step = contest.make(name, contest.model())
            step(contest.batch(0, rank))
            error = None
        except Exception as caught:
            error = f"{type(caught).__name__}: {caught}".splitlines()[0][:200]
        errors: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(errors, error)
        failed = next((e for e in errors if e is not None), None)
        if failed is None:
            ready[name] = step
        else:
            missing[name] = failed
    return ready, missing


def _turn(step: Step, batches: list[torch.Tensor], losses: list[float]) -> list[float]:
    taken = []
    dist.barrier()
    for index, batch in enumerate(batches):
        started = time.perf_counter()
        losses.append(step(batch))
        if index:
            taken.append(time.perf_counter() - started)
    return taken


def _result(
    times: dict[str, list[list[float]]], losses: dict[str, list[float]], missing: dict[str, str]
) -> dict[str, Any]:
    reference = next(iter(times))
    apart = {n: max(abs(a - b) for a, b in zip(each, losses[reference], strict=True)) for n, each in losses.items()}
    return {
        "reference": reference,
        "seconds": {name: asdict(spread([t for turn in each for t in turn])) for name, each in times.items()},
        "ratios": {other: {n: asdict(r) for n, r in paired_ratios(times, other).items()} for other in times},
        "largest_loss_difference": apart,
        "missing": missing,
    }
