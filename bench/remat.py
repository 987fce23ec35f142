"""Rematerialization to a budget: how long it takes to plan, and what half of the activations costs."""

from dataclasses import asdict
from typing import Any

import torch
from torch import fx
from tqdm import tqdm

import graphopt
from bench.remat_sweep import Workload, predicted_seconds, step_seconds
from bench.statistics import paired_ratios, spread
from bench.workloads import llama, tokens
from graphopt.cost.operations import work_of
from graphopt.ir import Program
from graphopt.lowering import lower
from graphopt.passes.pipeline import PassRecord
from graphopt.plan import Plan


class _Planned(Exception):
    """Says how long planning took; what comes behind it need not run."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds


def planner(depths: tuple[int, ...]) -> dict[int, float]:
    """Seconds that a budget of half the activations adds to compilation, by depth, under ZeRO-3 on 8 ranks."""
    _planned(min(depths))  # warms up
    return {depth: _planned(depth) for depth in tqdm(depths, desc="depths")}


def _planned(depth: int) -> float:
    plan = Plan.parse("zero=3,remat=0.5,verify=false").resolve(8)
    ids = tokens(0, 0)
    with torch.device("meta"):
        model = llama(depth, 64)
    try:
        lower(model, (), {"input_ids": ids, "labels": ids}, plan, observer=_stop_when_planned)
    except _Planned as planned:
        return planned.seconds
    raise AssertionError("the plan has a budget")


def _stop_when_planned(record: PassRecord, program: Program) -> None:
    if record.name == "rematerialize":
        raise _Planned(record.seconds)


def half(workload: Workload, rounds: int) -> dict[str, Any]:
    """A step with half of its activations beside one with all: floating-point operations, predicted and real time."""
    _, batch = workload.build()
    models = {"all": workload.compiled(""), "half": workload.compiled("0.5")}
    reports = {name: graphopt.report(model) for name, model in models.items()}
    step_seconds(list(models.values()), batch, 2)
    taken = dict(zip(models, step_seconds(list(models.values()), batch, rounds), strict=True))
    ratio = paired_ratios({name: [[each] for each in seconds] for name, seconds in taken.items()}, "all")["half"]
    flops = {name: _flops(report.step_graph) for name, report in reports.items()}
    predicted = {name: predicted_seconds(report.step_graph) for name, report in reports.items()}
    return {
        "flops": flops,
        "added_flops": flops["half"] / flops["all"] - 1,
        "predicted_seconds": predicted,
        "added_predicted_seconds": predicted["half"] / predicted["all"] - 1,
        "peak_bytes": {name: report.memory.peak_bytes for name, report in reports.items()},
        "activation_bytes": {name: report.memory.by_category["activations"] for name, report in reports.items()},
        "seconds": {name: asdict(spread(seconds)) for name, seconds in taken.items()},
        "time_ratio": asdict(ratio),
    }


def _flops(graph: fx.GraphModule) -> int:
    return sum(work_of(node).flops for node in graph.graph.nodes if node.op == "call_function")
