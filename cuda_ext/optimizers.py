"""SGD, Adagrad, Lion and LAMB over lists of tensors: native code on the CPU in one pass over memory, LAMB in two.

`graphopt.cuda_ext.adamw` has AdamW, which has the bits of torch's; these are near what torch's operators compute.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from graphopt.cuda_ext.arguments import ELEMENTS, FLOAT32, check
from graphopt.cuda_ext.library import library


class Run(NamedTuple):
    """What is updated together: contiguous tensors of one shape, which share no memory.

    parameter, states: float32, updated; gradient: float32 or bfloat16, only read; copy: bfloat16, set to the new
    parameter, rounded to nearest even.
    """

    parameter: torch.Tensor
    gradient: torch.Tensor
    states: tuple[torch.Tensor, ...]
    copy: torch.Tensor | None = None


class Rule(Protocol):
    """An optimizer's hyperparameters at one step.

    gradient_scale: what gradients are multiplied by before anything else; state_count: how many states a run has.
    """

    @property
    def gradient_scale(self) -> float: ...
    @property
    def state_count(self) -> int: ...
    @property
    def number(self) -> int | None:
        """What optimizers.cpp calls the rule; None for LAMB."""

    @property
    def factors(self) -> tuple[float, ...]:
        """`Factors` of optimizers.cpp, but for the first."""

    def apply(self, parameter: torch.Tensor, gradient: torch.Tensor, states: Sequence[torch.Tensor]) -> None:
        """The same in torch's operators, in place, for any float dtype; the gradient is scaled already."""


@dataclass(frozen=True)
class SGD:
    """``torch.optim.SGD``; step: 1 at the first update, whose gradient becomes the momentum, the one state if any."""

    lr: float
    step: int = 1
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    gradient_scale: float = 1.0
    number: int | None = 0

    @property
    def state_count(self) -> int:
        return int(self.momentum != 0)

    @property
    def factors(self) -> tuple[float, ...]:
        old, fresh = self._shares()
        ahead = (self.momentum, 1.0) if self.nesterov else (0.0, 0.0)
        return (self.lr, self.weight_decay, 0.0, old, fresh, *ahead, 1.0, 1.0)

    def apply(self, parameter: torch.Tensor, gradient: torch.Tensor, states: Sequence[torch.Tensor]) -> None:
        gradient = gradient + self.weight_decay * parameter
        direction = gradient
        if states:
            old, fresh = self._shares()
            states[0].mul_(old).add_(gradient, alpha=fresh)
            direction = gradient + self.momentum * states[0] if self.nesterov else states[0]
        parameter.sub_(direction, alpha=self.lr)

    def _shares(self) -> tuple[float, float]:
        return (0.0, 1.0) if self.step == 1 or not self.momentum else (self.momentum, 1 - self.dampening)


@dataclass(frozen=True)
class Adagrad:
    """``torch.optim.Adagrad``; its state is the sum of squares (Duchi et al., JMLR 12, 2011)."""

    lr: float
    step: int = 1
    lr_decay: float = 0.0
    weight_decay: float = 0.0
    eps: float = 1e-10
    gradient_scale: float = 1.0
    number: int | None = 1
    state_count: int = 1

    @property
    def rate(self) -> float:
        return self.lr / (1 + (self.step - 1) * self.lr_decay)

    @property
    def factors(self) -> tuple[float, ...]:
        return (self.rate, self.weight_decay, self.eps, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0)

    def apply(self, parameter: torch.Tensor, gradient: torch.Tensor, states: Sequence[torch.Tensor]) -> None:
        gradient = gradient + self.weight_decay * parameter
        states[0].add_(gradient.square())
        parameter.sub_(gradient / (states[0].sqrt() + self.eps), alpha=self.rate)


@dataclass(frozen=True)
class Lion:
    """Steps of the sign of a momentum, which is the state (Chen et al., arXiv:2302.06675)."""

    lr: float
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    gradient_scale: float = 1.0
    number: int | None = 2
    state_count: int = 1

    @property
    def factors(self) -> tuple[float, ...]:
        step, next_ = self.betas
        return (self.lr, self.weight_decay, 0.0, next_, 1 - next_, step, 1 - step, 1.0, 1.0)

    def apply(self, parameter: torch.Tensor, gradient: torch.Tensor, states: Sequence[torch.Tensor]) -> None:
        step, next_ = self.betas
        direction = states[0] * step + gradient * (1 - step)
        states[0].mul_(next_).add_(gradient, alpha=1 - next_)
        parameter.sub_(self.weight_decay * parameter + direction.sign(), alpha=self.lr)


@dataclass(frozen=True)
class LAMB:
    """Adam's direction, each run's as long as its parameter (You et al., arXiv:1904.00962); states: both moments.

    A run is a whole layer: parts of one would have lengths of their own. step: 1 at the first update.
    """

    lr: float
    step: int = 1
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    weight_decay: float = 0.0
    gradient_scale: float = 1.0
    number: int | None = None
    state_count: int = 2

    @property
    def factors(self) -> tuple[float, ...]:
        beta1, beta2 = self.betas
        shares = (beta1, 1 - beta1, beta2, 1 - beta2)
        return (self.lr, self.weight_decay, self.eps, *shares, 1 - beta1**self.step, 1 - beta2**self.step)

    def apply(self, parameter: torch.Tensor, gradient: torch.Tensor, states: Sequence[torch.Tensor]) -> None:
        first, second = states
        beta1, beta2 = self.betas
        first.mul_(beta1).add_(gradient, alpha=1 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = (second / (1 - beta2**self.step)).sqrt() + self.eps
        direction = first / (1 - beta1**self.step) / root + self.weight_decay * parameter
        lengths = parameter.norm(), direction.norm()
        trust = lengths[0] / lengths[1] if lengths[0] > 0 and lengths[1] > 0 else 1.0
        parameter.sub_(self.lr * trust * direction)


def update(runs: Sequence[Run], rule: Rule) -> None:
    """One step of `rule` on every run; torch's number of threads share it.

    Raises ValueError that names the run and its tensor which does not fit, before any is changed.
    """
    for index, run in enumerate(runs):
        _check(run, index, rule)
    native = library("optimizers.cpp")
    if native is None:
        for run in runs:
            _update_by_operators(run, rule)
        return
    words = [word for run in runs for word in _words(run)]
    factors = torch.tensor((rule.gradient_scale, *rule.factors), dtype=torch.float32)
    table = (ctypes.c_int64 * len(words))(*words)
    if rule.number is None:
        native.call("lamb", table, factors, len(runs))
    else:
        native.call("optimize", table, factors, len(runs), rule.number)
    # What watches tensors for changes (autograd, gathered copies of parameters) cannot see this one.
    torch.autograd.graph.increment_version([tensor for run in runs for tensor in _changed(run)])


def _check(run: Run, index: int, rule: Rule) -> None:
    shape, where = run.parameter.shape, f"run {index}:"
    check(f"{where} parameter", run.parameter, shape, FLOAT32)
    check(f"{where} gradient", run.gradient, shape, ELEMENTS)
    if len(run.states) != rule.state_count:
        raise ValueError(f"{where} states has {len(run.states)} tensors, {type(rule).__name__} has {rule.state_count}")
    for number, state in enumerate(run.states):
        check(f"{where} states[{number}]", state, shape, FLOAT32)
    if run.copy is not None:
        check(f"{where} copy", run.copy, shape, (torch.bfloat16,))


def _words(run: Run) -> tuple[int, ...]:
    """The run as optimizers.cpp reads it."""
    states = [state.data_ptr() for state in run.states]
    return (
        run.parameter.data_ptr(),
        run.gradient.data_ptr(),
        *[*states, 0, 0][:2],
        0 if run.copy is None else run.copy.data_ptr(),
        run.parameter.numel(),
        run.gradient.dtype == torch.bfloat16,
    )


def _changed(run: Run) -> list[torch.Tensor]:
    return [run.parameter, *run.states, *(() if run.copy is None else (run.copy,))]


@torch.no_grad()
def _update_by_operators(run: Run, rule: Rule) -> None:
    rule.apply(run.parameter, run.gradient.float() * rule.gradient_scale, run.states)
    if run.copy is not None:
        run.copy.copy_(run.parameter)
