"""The rules by which optimizers change a parameter: hyperparameters at one step, as rules.h reads them.

`graphopt.cuda_ext.adamw` has AdamW on the CPU with the bits of torch's; these are near what torch's operators compute.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

Number = float | torch.Tensor
Step = int | torch.Tensor
"""1 at the first update. A tensor, float64 and of no dimensions, where it is known to the device alone."""


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
        """What optimizers.cpp and optimizers.cu call the rule; None for LAMB."""

    @property
    def has_bytes(self) -> bool:
        """Whether its states may be `ByteState`."""

    @property
    def factors(self) -> tuple[Number, ...]:
        """`Factors` of rules.h, but for the first."""

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
    has_bytes: bool = True

    @property
    def state_count(self) -> int:
        return int(self.momentum != 0)

    @property
    def factors(self) -> tuple[Number, ...]:
        old, fresh = self._shares()
        ahead = (self.momentum, 1.0) if self.nesterov else (0.0, 0.0)
        return (self.lr, self.weight_decay, 0.0, old, fresh, *ahead, 1.0, 1.0, 1.0)

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
    step: Step = 1
    lr_decay: float = 0.0
    weight_decay: float = 0.0
    eps: float = 1e-10
    gradient_scale: float = 1.0
    number: int | None = 1
    state_count: int = 1
    has_bytes: bool = False

    @property
    def rate(self) -> Number:
        return self.lr / (1 + (self.step - 1) * self.lr_decay)

    @property
    def factors(self) -> tuple[Number, ...]:
        return (self.rate, self.weight_decay, self.eps, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0)

    def apply(self, parameter: torch.Tensor, gradient: torch.Tensor, states: Sequence[torch.Tensor]) -> None:
        gradient = gradient + self.weight_decay * parameter
        states[0].add_(gradient.square())
        parameter.sub_(self.rate * gradient / (states[0].sqrt() + self.eps))


@dataclass(frozen=True)
class Lion:
    """Steps of the sign of a momentum, which is the state (Chen et al., arXiv:2302.06675)."""

    lr: float
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    gradient_scale: float = 1.0
    number: int | None = 2
    state_count: int = 1
    has_bytes: bool = True

    @property
    def factors(self) -> tuple[Number, ...]:
        step, next_ = self.betas
        return (self.lr, self.weight_decay, 0.0, next_, 1 - next_, step, 1 - step, 1.0, 1.0, 1.0)

    def apply(self, parameter: torch.Tensor, gradient: torch.Tensor, states: Sequence[torch.Tensor]) -> None:
        step, next_ = self.betas
        direction = states[0] * step + gradient * (1 - step)
        states[0].mul_(next_).add_(gradient, alpha=1 - next_)
        parameter.sub_(self.weight_decay * parameter + direction.sign(), alpha=self.lr)


@dataclass(frozen=True)
class Adam:
    """``torch.optim.Adam``, decoupled ``AdamW`` (arXiv:1412.6980, arXiv:1711.05101); states: both moments."""

    lr: float
    step: Step = 1
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    is_decoupled: bool = False
    gradient_scale: float = 1.0
    number: int | None = 3
    state_count: int = 2
    has_bytes: bool = True

    @property
    def correction(self) -> Number:
        """What the root of the second moment is divided by."""
        return _root(1 - self.betas[1] ** self.step)

    @property
    def kept(self) -> float:
        """What is left of the parameter before the step."""
        return 1 - self.lr * self.weight_decay if self.is_decoupled else 1.0

    @property
    def rate(self) -> Number:
        return self.lr / (1 - self.betas[0] ** self.step)

    @property
    def factors(self) -> tuple[Number, ...]:
        beta1, beta2 = self.betas
        added = 0.0 if self.is_decoupled else self.weight_decay
        return (self.rate, added, self.eps, 0.0, 1 - beta1, beta2, 1 - beta2, self.correction, 1.0, self.kept)

    def apply(self, parameter: torch.Tensor, gradient: torch.Tensor, states: Sequence[torch.Tensor]) -> None:
        if self.weight_decay and not self.is_decoupled:
            gradient = gradient + self.weight_decay * parameter
        parameter.mul_(self.kept)
        first, second = states
        first.lerp_(gradient, 1 - self.betas[0])
        second.mul_(self.betas[1]).addcmul_(gradient, gradient, value=1 - self.betas[1])
        denominator = (second.sqrt() / self.correction).add_(self.eps)
        parameter.addcdiv_(first, denominator, value=-float(self.rate))


@dataclass(frozen=True)
class LAMB:
    """Adam's direction, each run's as long as its parameter (You et al., arXiv:1904.00962); states: both moments.

    A run is a whole layer: parts of one would have lengths of their own.
    """

    lr: float
    step: Step = 1
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    weight_decay: float = 0.0
    gradient_scale: float = 1.0
    number: int | None = None
    state_count: int = 2
    has_bytes: bool = False

    @property
    def factors(self) -> tuple[Number, ...]:
        beta1, beta2 = self.betas
        shares = (beta1, 1 - beta1, beta2, 1 - beta2)
        return (self.lr, self.weight_decay, self.eps, *shares, 1 - beta1**self.step, 1 - beta2**self.step, 1.0)

    def apply(self, parameter: torch.Tensor, gradient: torch.Tensor, states: Sequence[torch.Tensor]) -> None:
        first, second = states
        beta1, beta2 = self.betas
        first.mul_(beta1).add_(gradient, alpha=1 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = (second / (1 - beta2**self.step)).sqrt() + self.eps
        direction = first / (1 - beta1**self.step) / root + self.weight_decay * parameter
        lengths = parameter.norm(), direction.norm()
        trust = torch.where((lengths[0] > 0) & (lengths[1] > 0), lengths[0] / lengths[1], 1.0)
        parameter.sub_(self.lr * trust * direction)


def _root(x: Number) -> Number:
    return x**0.5
