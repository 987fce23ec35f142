"""Steps of optimizers over whole parameter lists, for `bench.gpu_kernels`: what they move, and rivals."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graphopt.cuda_ext.byte_states import ByteState
from graphopt.cuda_ext.optimizers import Run, gradient_norm, update
from graphopt.cuda_ext.rules import LAMB, SGD, Adagrad, Adam, Lion, Rule

_LAYER = ((4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), *((14336, 4096),) * 3, (4096,), (4096,))
LARGE = _LAYER * 2  # of Llama 3 8B
SMALL = ((64, 64), (64,), (3,))
Step = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """A step on a list. moved: bytes that it must read and write for each element; rule: None of a norm alone."""

    name: str
    moved: float
    step: Callable[[list[Run]], Any]
    rivals: Callable[[list[Run]], dict[str, Step]]
    runs: Callable[[tuple[tuple[int, ...], ...], str], list[Run]]
    rule: Any = None

    def error(self, device: str) -> float:
        """The largest distance of a parameter from the same in float64, of its largest element."""
        if self.rule is None:
            return self._error_of_norm(device)
        worst = 0.0
        runs = self.runs(SMALL, device)
        before = [(run.parameter.double(), run.gradient.double(), _states(run)) for run in runs]
        self.step(runs)
        for run, (parameter, gradient, states) in zip(runs, before, strict=True):
            self.rule.apply(parameter, gradient, states)
            worst = max(worst, float((run.parameter.double() - parameter).abs().max() / parameter.abs().max()))
        return worst

    def _error_of_norm(self, device: str) -> float:
        runs = self.runs(SMALL, device)
        exact = torch.cat([run.gradient.double().view(-1) for run in runs]).norm()
        return float((self.step(runs).norm - exact).abs() / exact)


def cases() -> list[Case]:
    adam = Adam(1e-3, step=10, weight_decay=0.1, is_decoupled=True)
    f32, bf16 = torch.float32, torch.bfloat16
    return [
        _case("AdamW", 28, adam, f32, f32, _torchs(torch.optim.AdamW, lr=1e-3)),
        _case("AdamW, bf16 of masters", 28, adam, f32, bf16, None, copy=bf16),
        _case("AdamW, bf16 with 8-bit states", 10 + 16 / 256, adam, bf16, bf16, None, has_bytes=True),
        _case("Lion", 20, Lion(1e-4), f32, f32, None),
        _case("SGD", 20, SGD(0.1, step=10, momentum=0.9), f32, f32, _torchs(torch.optim.SGD, lr=0.1, momentum=0.9)),
        _case("Adagrad", 20, Adagrad(0.1), f32, f32, _torchs(torch.optim.Adagrad, ("foreach",), lr=0.1)),
        _case("LAMB", 40, LAMB(1e-3, step=10), f32, f32, None),
        Case("norm of gradients", 2, _norm, _total_norm, _lists(adam, f32, bf16)),
    ]


def _case(
    name: str, moved: float, rule: Rule, parameter: torch.dtype, gradient: torch.dtype, rivals: Any, **of: Any
) -> Case:
    lists = _lists(rule, parameter, gradient, **of)
    return Case(name, moved, lambda runs: update(runs, rule), rivals or (lambda runs: {}), lists, rule)


def _lists(
    rule: Rule,
    parameter: torch.dtype,
    gradient: torch.dtype,
    *,
    copy: torch.dtype | None = None,
    has_bytes: bool = False,
) -> Callable[[tuple[tuple[int, ...], ...], str], list[Run]]:
    def run(shape: tuple[int, ...], device: str) -> Run:
        weight, slope = (torch.randn(shape, device=device) for _ in range(2))
        states = tuple(
            ByteState.zeros(weight) if has_bytes else torch.zeros(shape, device=device) for _ in range(rule.state_count)
        )
        copies = None if copy is None else torch.empty(shape, dtype=copy, device=device)
        return Run(weight.to(parameter), slope.to(gradient), states, copies)

    return lambda shapes, device: [run(shape, device) for shape in shapes]


def _states(run: Run) -> list[Tensor]:
    numbered = enumerate(run.states)
    return [(each.values(is_signed=not n) if isinstance(each, ByteState) else each).double() for n, each in numbered]


def _torchs(
    make: Any, ways: tuple[str, ...] = ("fused", "foreach"), **options: Any
) -> Callable[[list[Run]], dict[str, Step]]:
    """Torch's optimizer of the same parameters and gradients."""

    def steps(runs: list[Run]) -> dict[str, Step]:
        parameters = [torch.nn.Parameter(run.parameter) for run in runs]
        for parameter, run in zip(parameters, runs, strict=True):
            parameter.grad = run.gradient
        return {way: make(parameters, **{way: True}, **options).step for way in ways}

    return steps


def _norm(runs: list[Run]) -> Any:
    return gradient_norm([run.gradient for run in runs], most=1.0)


def _total_norm(runs: list[Run]) -> dict[str, Step]:
    gradients = [run.gradient for run in runs]
    return {"foreach": lambda: torch.nn.utils.get_total_norm(gradients, foreach=True)}


def measured(
    case: Case, shapes: tuple[tuple[int, ...], ...], device: str, seconds: Callable[[Step, str], float]
) -> dict[str, Any]:
    """Bytes that a step moves, and the seconds of each rival's."""
    runs = case.runs(shapes, device)
    times = {"graphopt": seconds(lambda: case.step(runs), device)}
    for name, step in case.rivals(runs).items():
        times[name] = seconds(step, device)
    return {"moved": case.moved * sum(run.parameter.numel() for run in runs), "seconds": times}
