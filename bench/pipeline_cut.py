"""The cut of a giant into stages: seconds of the pass, and how far its slowest stage is above the least possible."""

import itertools
import time
from dataclasses import asdict
from typing import Any

import torch

from bench.giant import llama_405b
from bench.statistics import spread
from graphopt.capture.arguments import flatten_call, tensor_names
from graphopt.capture.export import capture
from graphopt.cost.device import hardware_of
from graphopt.passes import REGISTRY
from graphopt.passes.base import PassContext
from graphopt.passes.crossing import Row
from graphopt.passes.cut import Cut, CutOptions
from graphopt.passes.pipeline import Pipeline
from graphopt.plan import Plan
from graphopt.runtime.parameters import choose_layouts


def giant(stages: int, rounds: int) -> dict[str, Any]:
    """Llama-3.1-405B cut into `stages`, on the hardware that stands for the meta device.

    seconds: of the pass, for one stage. of_best: time of the slowest stage, over `bound_seconds`, than which no cut is
    faster: that of all calls shared out evenly, or of the longest call.
    """
    hardware, seconds = hardware_of(torch.device("meta")), list[float]()
    model, batch = llama_405b()
    for _ in range(rounds):
        tensors, spec = flatten_call((), batch)
        captured = capture(model, tensors, spec, tensor_names(model.forward, (), batch))
        layouts = choose_layouts(model, Plan(mesh={"pp": stages}).resolve(stages))
        context = PassContext(captured.fake_mode, {"pp": stages}, layouts, hardware=hardware)
        Pipeline.parse("canonicalize", REGISTRY).run(captured.program, context)
        by_call = Row(captured.program).seconds(hardware)
        started = time.perf_counter()
        Cut(CutOptions(stages=stages)).run(captured.program, context)
        seconds.append(time.perf_counter() - started)
    counts = [int(count) for count in str(context.statistics["calls"]).split("|")]
    ends = [0, *itertools.accumulate(counts)]
    by_stage = [float(by_call[first:behind].sum()) for first, behind in itertools.pairwise(ends)]
    bound = max(float(by_call.sum()) / stages, float(by_call.max()))
    return {
        "seconds": asdict(spread(seconds)),
        "calls": counts,
        "stage_seconds": by_stage,
        "bound_seconds": bound,
        "of_best": max(by_stage) / bound,
    }
