"""Budgets: kept, monotone, near the optimum, bit for bit, and an error below what can be."""

import random

import pytest
import torch
from torch import fx, nn

from bench.optimum import optimum
from bench.remat_sweep import least_budget, predicted_seconds, seconds_of
from bench.vision import mixer
from graphopt.cost.frontier import Frontier
from graphopt.cost.operations import work_of
from graphopt.cost.refine import Refinement
from graphopt.cost.repetition import Timeline
from graphopt.errors import PassError
from graphopt.inspect.differential import check
from graphopt.ir import Level, Phase, Program, facts_of
from graphopt.ir.snapshot import copied
from graphopt.lowering import lower
from graphopt.plan import Plan
from graphopt.report import Report
from tests.support.programs import lowered
from tests.support.zoo import WITH_DROPOUT, ZOO, Entry

PLANS = ["dp=1", "dp=2,zero=3,zero.whole_below=0"]


def _report(entry: Entry, text: str) -> Report:
    plan = Plan.parse(text)
    return lower(entry.build(), (), entry.batch(), plan.resolve(plan.mesh["dp"])).report


def _floor(entry: Entry, plan: str) -> int:
    with pytest.raises(PassError, match=r"out of reach; the nearest is \d+ bytes .* at \w+: ") as caught:
        _report(entry, f"{plan},remat=1,verify=false")
    return int(str(caught.value).partition("nearest is ")[2].split()[0])


@pytest.mark.parametrize("plan", PLANS)
def test_the_peak_never_rises_and_the_step_never_gets_shorter_as_the_budget_falls(plan: str) -> None:
    entry = ZOO["vit"]
    highest = _report(entry, plan).memory.peak_bytes
    floor = _floor(entry, plan)
    assert floor < highest
    budgets = [highest - (highest - floor) * step // 4 for step in range(5)]
    reports = [_report(entry, f"{plan},remat={budget},verify=false") for budget in budgets]
    peaks = [report.memory.peak_bytes for report in reports]
    repeated = [_extra(report) for report in reports]
    assert all(peak <= budget for peak, budget in zip(peaks, budgets, strict=True))
    assert peaks == sorted(peaks, reverse=True) and peaks[-1] == floor
    assert repeated == sorted(repeated) and repeated[0] == 0 < repeated[-1]


def _extra(report: Report) -> int:
    """FLOPs of what is computed again."""
    return sum(work_of(n).flops for n in report.step_graph.graph.nodes if facts_of(n).made_by == "rematerialize")


@pytest.mark.parametrize("entry", [ZOO["llama"], WITH_DROPOUT["gpt2"]], ids=["llama", "gpt2 with dropout"])
def test_no_bit_changes(entry: Entry) -> None:
    verdict = check(entry.build(), (), entry.batch(), Plan.parse("dp=2,zero=3,remat=0.5").resolve(2))
    assert verdict.guilty is None
    (found,) = (each for each in verdict.comparisons if each.name == "rematerialize")
    assert found.worst == 0.0


class _Drawn(nn.Module):
    """Operations on earlier values, of different widths, at random."""

    def __init__(self, seed: int, calls: int) -> None:
        super().__init__()
        chance = random.Random(seed)
        self.weights = nn.ParameterList()
        self.calls: list[tuple[str, int, int]] = []
        widths = [16]
        for _ in range(calls):
            source = chance.randrange(max(0, len(widths) - 3), len(widths))
            kind = chance.choice(["sin", "exp", "tanh", "mul", "linear", "linear"])
            other, width = 0, widths[source]
            if kind == "mul":
                other = chance.choice([place for place, each in enumerate(widths) if each == width])
            elif kind == "linear":
                other, width = len(self.weights), chance.choice([8, 16, 32, 64])
                self.weights.append(nn.Parameter(torch.randn(width, widths[source]) / 10))
            self.calls.append((kind, source, other))
            widths.append(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values = [x]
        for kind, source, other in self.calls:
            if kind == "linear":
                values.append(nn.functional.linear(values[source], self.weights[other]))
            elif kind == "mul":
                values.append(values[source] * values[other])
            else:
                values.append(getattr(torch, kind)(values[source]))
        return values[-1].mean() + values[-2].mean()


def _seconds(node: fx.Node) -> float:
    flops = work_of(node).flops
    return 1e-6 * (flops > 0) + 1e-9 * flops


def _gaps(program: Program) -> list[float]:
    """Of budgets from the floor up: how much more is computed again than the exact integer program finds."""
    repeatable = set(program.compute_nodes(Phase.FORWARD))
    timeline = Timeline(program, _seconds, lambda node: None)
    frontier = Frontier(program, repeatable, _seconds)
    choices = Refinement(program, repeatable, timeline).choices(frontier, 500)
    outcomes = [timeline.after(choice) for choice in choices]
    without = timeline.after(())
    gaps = []
    for share in (0.0, 0.4, 0.8):
        limit = int(outcomes[-1].peak_bytes + share * (without.peak_bytes - outcomes[-1].peak_bytes))
        found = next(each.seconds for each in outcomes if each.peak_bytes <= limit) - without.seconds
        best = optimum(program, _seconds, limit)
        assert best is not None and best.is_proven and best.seconds is not None
        assert best.seconds <= found + 1e-9, "the optimum is no worse than what was found"
        gaps.append(found / best.seconds - 1 if best.seconds > 1e-12 else found)
    return gaps


def _worst_gap(seeds: range, calls: int) -> float:
    x = torch.randn(32, 16)
    programs = (lowered("passes=canonicalize,differentiate", 1, _Drawn(s, calls), x=x)[1] for s in seeds)
    return max(gap for program in programs for gap in _gaps(program))


def test_small_steps_are_computed_again_as_little_as_can_be() -> None:
    assert _worst_gap(range(4), calls=6) <= 0.02


@pytest.mark.long
def test_many_steps_are_computed_again_as_little_as_can_be() -> None:
    assert _worst_gap(range(100, 120), calls=9) <= 0.02


def test_a_model_is_computed_again_as_little_as_can_be_through_all_of_its_parts() -> None:
    """Calls outside of any module and values between layers may be computed again, too."""
    batch = {"images": torch.randn(64, 3, 32, 32), "labels": torch.randint(1000, (64,))}
    model = mixer(side=32, patch=4, width=64, blocks=1)
    steps: list[Program] = []

    def compiled(remat: str) -> Report:
        plan = Plan.parse(f"dp=1,verify=false{remat}").resolve(1)
        return lower(model, (), batch, plan, observer=lambda record, program: steps.append(copied(program))).report

    highest = compiled("").memory.peak_bytes
    step = next(program for program in steps if program.level is Level.STEP)
    floor = least_budget(lambda remat: compiled(f",remat={remat}"))
    without = predicted_seconds(step.module)
    for share in (0.0, 0.25, 0.75):
        limit = int(floor + share * (highest - floor))
        found = predicted_seconds(compiled(f",remat={limit}").step_graph) - without
        best = optimum(step, seconds_of, limit)
        assert best is not None and best.is_proven and best.seconds is not None
        assert best.seconds - 1e-12 <= found <= 1.02 * best.seconds
