"""Peaks of steps beside their budgets, of graphopt and of PyTorch's own ``activation_memory_budget``.

PyTorch's budget is a share of what it saves: 1 is its default, 0 computes as much again as it can.
"""

import contextlib
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils.flop_counter import flop_registry
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

import graphopt
from bench.live import Live, state_of, step, warmed_up
from bench.statistics import spread
from graphopt._torch import TorchDispatchMode, activation_memory_budget, backend_of_halves
from graphopt.cost.device import hardware_of
from graphopt.cost.duration import compute_seconds
from graphopt.cost.operations import work_of
from graphopt.errors import PassError

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Workload:
    """A Llama that trains on the CPU, and a batch of it."""

    layers: int = 3
    hidden: int = 64
    rows: int = 4
    length: int = 128
    vocabulary: int = 512

    def build(self) -> tuple[nn.Module, Batch]:
        """The same random weights and tokens at every call."""
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.hidden * 8 // 3 // 8 * 8,
            num_hidden_layers=self.layers,
            num_attention_heads=self.hidden // 16,
            use_cache=False,
        )
        ids = torch.randint(self.vocabulary, (self.rows, self.length))
        return LlamaForCausalLM(config).train(), {"input_ids": ids, "labels": ids}

    def compiled(self, remat: str) -> nn.Module:
        """On one rank. remat: a budget as in a plan; none if empty. Raises PassError for one that cannot be kept."""
        model, batch = self.build()
        plan = "dp=1,verify=false" + (f",remat={remat}" if remat else "")
        return graphopt.compile(model, plan, example_inputs=batch)


@dataclass(frozen=True)
class Point:
    """A step under a budget. share: of the way from the least peak to that without a budget; limit_bytes: the same.

    peak_bytes: measured. flops: of matrix products and attention that ran.
    """

    share: float
    limit_bytes: int
    peak_bytes: int
    flops: int


def sweep(points: int, rounds: int, workload: Workload) -> dict[str, Any]:
    """Budgets at equal distances from no limit down to the least."""
    shares = [1 - place / (points - 1) for place in range(points)]
    ours, predicted = _ours(shares, rounds, workload)
    theirs = _theirs(shares, workload)
    return {
        "graphopt": [asdict(point) | more for point, more in zip(ours, predicted, strict=True)],
        "torch": [asdict(point) for point in theirs],
        "violations": {"graphopt": violations(ours), "torch": violations(theirs)},
    }


def violations(points: Iterable[Point]) -> dict[str, int]:
    """How often, as the budget falls, the peak rises or is above the budget, and the largest rise in bytes."""
    points = list(points)
    rises = [after.peak_bytes - before.peak_bytes for before, after in itertools.pairwise(points)]
    return {
        "rises": sum(rise > 0 for rise in rises),
        "largest_rise_bytes": max([0, *rises]),
        "above_budget": sum(point.peak_bytes > point.limit_bytes for point in points),
    }


def _ours(shares: list[float], rounds: int, workload: Workload) -> tuple[list[Point], list[dict[str, Any]]]:
    """Measured points, and beside them what was predicted and the seconds of a step, budgets interleaved."""
    _, batch = workload.build()
    highest = graphopt.report(workload.compiled("")).memory.peak_bytes
    floor = least_budget(workload.compiled)
    limits = [floor + round(share * (highest - floor)) for share in shares]
    models = [workload.compiled(str(limit)) for limit in tqdm(limits, desc="graphopt")]
    points, predicted = [], []
    for share, limit, model in zip(shares, limits, models, strict=True):
        points.append(Point(share, limit, *_measured(model, batch, lambda mode: mode)))
        report = graphopt.report(model)
        seconds = predicted_seconds(report.step_graph)
        predicted.append({"predicted_bytes": report.memory.peak_bytes, "predicted_seconds": seconds})
    for each, taken in zip(predicted, step_seconds(models, batch, rounds), strict=True):
        each["seconds"] = asdict(spread(taken))
    return points, predicted


def least_budget(compiled: Callable[[str], object]) -> int:
    """The least budget in bytes with which `compiled` succeeds: the error for a smaller one names it."""
    try:
        compiled("1")
    except PassError as error:
        return int(str(error).partition("the nearest is ")[2].split()[0])
    raise AssertionError("a step within one byte was found")


def seconds_of(call: fx.Node) -> float:
    """What a call takes on the CPU, by the cost model."""
    return compute_seconds(work_of(call), hardware_of(torch.device("cpu")))


def predicted_seconds(graph: fx.GraphModule) -> float:
    """What the calls of a step take on the CPU, by the cost model."""
    return sum(seconds_of(node) for node in graph.graph.nodes if node.op == "call_function")


def step_seconds(models: Sequence[nn.Module], batch: Batch, rounds: int) -> list[list[float]]:
    """Seconds of steps of each model, round by round one of each."""
    taken: list[list[float]] = [[] for _ in models]
    for _ in range(rounds):
        for model, seconds in zip(models, taken, strict=True):
            started = time.perf_counter()
            step(model, batch)
            seconds.append(time.perf_counter() - started)
            model.zero_grad()
    return taken


class _Backend:
    """For torch.compile, which leaves a model as it is while a dispatch mode is on: graphs that put modes on inside."""

    def __init__(self) -> None:
        self._modes: list[TorchDispatchMode] = []
        self.backend = backend_of_halves(self._half)

    @contextlib.contextmanager
    def under(self, mode: TorchDispatchMode) -> Iterator[None]:
        """Operations of the graphs run under a mode."""
        self._modes.append(mode)
        yield
        self._modes.pop()

    def _half(self, module: fx.GraphModule) -> Callable[[list[Any]], Any]:
        def run(arguments: list[Any]) -> Any:
            with contextlib.ExitStack() as stack:
                for mode in self._modes:
                    stack.enter_context(mode)
                return fx.Interpreter(module).boxed_run(arguments)

        return run


def _theirs(shares: list[float], workload: Workload) -> list[Point]:
    """The same shares as torch.compile's budget; in bytes, from the least of its own peaks to that without a budget."""
    found = []
    for share in tqdm(shares, desc="torch"):
        torch.compiler.reset()
        model, batch = workload.build()
        backend = _Backend()
        model.compile(backend=backend.backend)
        with activation_memory_budget(share):
            found.append(_measured(model, batch, backend.under))
    highest, floor = found[0][0], min(peak for peak, _ in found)
    limits = [floor + round(share * (highest - floor)) for share in shares]
    return [Point(share, limit, *each) for share, limit, each in zip(shares, limits, found, strict=True)]


def _measured(model: nn.Module, batch: Batch, under: Callable[[TorchDispatchMode], Any]) -> tuple[int, int]:
    """The peak in bytes and the floating-point operations of a step. under: what runs operations under a mode."""
    warmed_up(model, batch)
    live, counter = Live(state_of(model, batch)), _Flops()
    for mode in (live, counter):
        with under(mode):
            step(model, batch)
        model.zero_grad()
    return live.most, counter.total


class _Flops(TorchDispatchMode):
    """Counts floating-point operations by torch's own formulas: matrix products, convolutions and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        count = flop_registry.get(function.overloadpacket)
        if count is not None:
            self.total += count(*args, **(kwargs or {}), out_val=result)
        return result
