"""Seconds from model to program: growth with depth, beside torch.compile's first step, and a very large model."""

import subprocess
import sys
import time
from typing import Any

import torch

from bench.workloads import llama, tokens

GIANT = """
import resource, time, torch
from transformers import LlamaConfig, LlamaForCausalLM
from graphopt.driver import lower
from graphopt.plan import Plan
started = time.perf_counter()
with torch.device("meta"):
    config = LlamaConfig(vocab_size=128256, hidden_size=16384, intermediate_size=53248, num_hidden_layers=126,
                         num_attention_heads=128, num_key_value_heads=8, use_cache=False, dtype=torch.bfloat16)
    model = LlamaForCausalLM(config)
    ids = torch.empty(1, 8192, dtype=torch.int64)
report = lower(model, (), {"input_ids": ids, "labels": ids}, Plan.parse("dp=1024,zero=3").resolve(1024)).report
most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(time.perf_counter() - started, most, len(report.step_graph.graph.nodes))
"""


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
    """The 126-layer Llama-3.1-405B shape under ZeRO-3 on 1,024 ranks: seconds, and the most bytes resident."""
    found = subprocess.run([sys.executable, "-W", "ignore", "-c", GIANT], capture_output=True, text=True, check=True)
    seconds, kibibytes, nodes = found.stdout.split()[-3:]
    return {"seconds": float(seconds), "resident_bytes": float(kibibytes) * 1024, "step_nodes": float(nodes)}
