"""Step times of all rivals, interleaved in one run: round after round, a few steps of each."""

import os
import time
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from bench.rivals import RIVALS, Step
from bench.statistics import paired_ratios, spread
from bench.workloads import llama, tokens


def measure(rivals: list[str], world: int, rounds: int, steps: int, port: int = 29617) -> dict[str, Any]:
    """Run all rivals in the same `world` processes.

    Each round runs `steps` + 1 steps of every rival in turn; the first of a turn warms the caches and is not counted.
    """
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    arguments = [(rank, world, port, rivals, rounds, steps, queue) for rank in range(world)]
    processes = [context.Process(target=_rank, args=each) for each in arguments]
    for process in processes:
        process.start()
    result: dict[str, Any] = queue.get(timeout=3600)
    for process in processes:
        process.join(timeout=60)
        process.kill()
    return result


def _rank(rank: int, world: int, port: int, rivals: list[str], rounds: int, steps: int, queue: Any) -> None:
    cores = sorted(os.sched_getaffinity(0))
    if world <= len(cores):
        os.sched_setaffinity(0, {cores[rank]})
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    dist.init_process_group("gloo")
    ready, missing = _prepare(rivals, rank)
    times: dict[str, list[list[float]]] = {name: [] for name in ready}
    losses: dict[str, list[float]] = {name: [] for name in ready}
    for turn in range(rounds + 1):
        for name, step in ready.items():
            taken = _turn(step, turn, steps, rank, losses[name])
            if turn:
                times[name].append(taken)
    if rank == 0:
        queue.put(_result(times, losses, missing))
        queue.close()
        queue.join_thread()  # the result is on its way before the process ends
    dist.barrier()
    os._exit(0)  # some rivals leave threads that outlive their group


def _prepare(rivals: list[str], rank: int) -> tuple[dict[str, Step], dict[str, str]]:
    """Those that can be built on every rank, and why the others cannot."""
    ready: dict[str, Step] = {}
    missing: dict[str, str] = {}
    for name in rivals:
        try:
            step = RIVALS[name](llama())
            step(tokens(0, rank))
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


def _turn(step: Step, turn: int, steps: int, rank: int, losses: list[float]) -> list[float]:
    taken = []
    dist.barrier()
    for index in range(steps + 1):
        batch = tokens(turn * (steps + 1) + index + 1, rank)
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
