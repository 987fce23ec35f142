"""Seconds from model to program: growth with depth, beside torch.compile's first step, and a very large model."""

import json
import resource
import subprocess
import sys
import time
from typing import Any

import torch

from bench.workloads import llama, tokens

INSPECT = "summary bench/giant.py:llama_405b --plan dp=1024,zero=3 --json"


def growth(depths: tuple[int, ...], repeats: int) -> dict[int, list[float]]:
    """Seconds of capture, passes and emission for each depth, under ZeRO-3 on 8 ranks; depths interleaved."""
    from graphopt.driver import lower
    from graphopt.plan import Plan

    plan = Plan.parse("zero=3").resolve(8)
    ids = tokens(0, 0)
    lower(llama(1, 64), (), {"input_ids": ids, "labels": ids}, plan)
    seconds: dict[int, list[float]] = {depth: [] for depth in depths}
    for _ in range(repeats):
        for depth in depths:
            with torch.device("meta"):
                model = llama(depth, 64)
            started = time.perf_counter()
            lower(model, (), {"input_ids": ids, "labels": ids}, plan)
            seconds[depth].append(time.perf_counter() - started)
    return seconds


def first_steps(layers: int) -> dict[str, float]:
    """Seconds of the first training step: compiled by graphopt, and by torch.compile with empty caches."""
    import graphopt

    ids = tokens(0, 0)
    seconds = {}
    for name in ("graphopt", "torch.compile"):
        model = llama(layers)
        started = time.perf_counter()
        compiled: Any = graphopt.compile(model) if name == "graphopt" else torch.compile(model)
        with torch._inductor.utils.fresh_cache():
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
