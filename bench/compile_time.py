"""Seconds from model to program: growth with depth, what the verifier takes, torch.compile beside it, a giant."""

import dataclasses
import json
import resource
import subprocess
import sys
import time
from typing import Any

import torch

from bench.workloads import llama, tokens

INSPECT = "summary bench/giant.py:llama_405b --plan dp=1024,zero=3 --format json"


def growth(depths: tuple[int, ...], repeats: int) -> dict[int, list[float]]:
    """Seconds of capture, passes and emission for each depth, under ZeRO-3 on 8 ranks; depths interleaved."""
    seconds: dict[int, list[float]] = {depth: [] for depth in depths}
    _compiled(1)
    for _ in range(repeats):
        for depth in depths:
            seconds[depth].append(_compiled(depth)[0])
    return seconds


def verification(depths: tuple[int, ...], repeats: int) -> dict[int, list[float]]:
    """The verifier's share of a compilation's processor time, for each depth; runs with and without it interleaved."""
    shares: dict[int, list[float]] = {depth: [] for depth in depths}
    _compiled(1)
    for _ in range(repeats):
        for depth in depths:
            without, with_it = _compiled(depth, verify=False)[1], _compiled(depth)[1]
            shares[depth].append((with_it - without) / with_it)
    return shares


def _compiled(depth: int, *, verify: bool = True) -> tuple[float, float]:
    """Seconds and seconds of processor time to compile a Llama of that depth without weights."""
    from graphopt.lowering import lower
    from graphopt.plan import Plan

    plan = dataclasses.replace(Plan.parse("zero=3"), verify=verify).resolve(8)
    ids = tokens(0, 0)
    with torch.device("meta"):
        model = llama(depth, 64)
    started, used = time.perf_counter(), time.process_time()
    lower(model, (), {"input_ids": ids, "labels": ids}, plan)
    return time.perf_counter() - started, time.process_time() - used


def first_steps(layers: int) -> dict[str, float]:
    """Seconds of the first training step: compiled by graphopt, and by torch.compile with empty caches."""
    import graphopt
    from graphopt._torch import fresh_inductor_cache

    ids = tokens(0, 0)
    seconds = {}
    for name in ("graphopt", "torch.compile"):
        model = llama(layers)
        started = time.perf_counter()
        compiled: Any = graphopt.compile(model) if name == "graphopt" else torch.compile(model)
        with fresh_inductor_cache():
            compiled(input_ids=ids, labels=ids).loss.backward()
        seconds[name] = time.perf_counter() - started
    return seconds


def giant() -> dict[str, float]:
    """``graphopt-inspect`` on the Llama-3.1-405B shape under ZeRO-3 on 1,024 ranks: seconds, most bytes resident."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "graphopt.inspect.cli", *INSPECT.split()]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - started
    most = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    peak = json.loads(found.stdout)["memory"]["peak_bytes"]
    return {"seconds": seconds, "resident_bytes": most, "predicted_peak_bytes": peak}
