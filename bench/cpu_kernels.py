"""The kernels for the CPU beside torch, eager and compiled by Inductor, interleaved."""

import math
import statistics
import time
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import torch
from tqdm import tqdm

from bench.cpu_kernel_cases import CASES, Call, Case
from bench.statistics import paired_ratios, spread

_TURN_SECONDS = 0.03  # what a turn lasts at least, so that clocks and calls of Python do not count


def compare(kernels: list[str], dtypes: list[str], rounds: int, threads: int) -> dict[str, Any]:
    """Seconds a call, each case's, and the geometric means of eager's and compiled's over ours, by kernel and of these.

    Of these, so that no kernel counts for more because it has more cases.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    found: list[dict[str, Any]] = []
    for kernel in tqdm(kernels):
        for dtype in dtypes:
            torch.manual_seed(0)
            for case in CASES[kernel](getattr(torch, dtype)):
                found.append(
                    {
                        "family": kernel,
                        "kernel": case.kernel,
                        "shape": case.shape,
                        "dtype": dtype,
                        **_measured(case, rounds),
                    }
                )
    torch.set_num_threads(before)
    means = {
        name: {
            kernel: _mean(case["ratios"][name]["median"] for case in found if case["family"] == kernel)
            for kernel in kernels
        }
        for name in ("eager", "compile")
    }
    return {"cases": found, "means": {name: {"all": _mean(each.values()), **each} for name, each in means.items()}}


def _mean(ratios: Iterable[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, ratios)))


def _measured(case: Case, rounds: int) -> dict[str, Any]:
    torch.compiler.reset()
    rivals = case.rivals()
    times: dict[str, list[list[float]]] = {name: [] for name in rivals}
    calls = {name: _calls(call) for name, call in rivals.items()}
    for _ in range(rounds):
        for name, call in rivals.items():
            times[name].append([_turn(call, calls[name])])
    return {
        "seconds": {name: asdict(spread([turn for (turn,) in each])) for name, each in times.items()},
        "ratios": {name: asdict(each) for name, each in paired_ratios(times, "graphopt").items()},
    }


def _calls(call: Call) -> int:
    """How many fill a turn; the first, which may compile, is not counted."""
    call()
    return max(1, math.ceil(_TURN_SECONDS / _turn(call, 3)))


def _turn(call: Call, calls: int) -> float:
    started = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - started) / calls
