"""The same few steps of training, eager and compiled, and how far their results lie apart."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

import graphopt
from tests.support.zoo import Entry, loss_of

# Adam divides each gradient by its own size, so a parameter whose true gradient is zero (the bias of attention's keys)
# moves by rounding noise alone, in eager as in any other order of sums. This epsilon lies above that noise.
EPSILON = 1e-5
STEPS = 5


@dataclass
class Trained:
    """Losses of each step and parameters after the last, whole."""

    losses: list[float]
    parameters: dict[str, torch.Tensor]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A detached copy of a parameter, gathered if it is sharded."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def train(
    model: nn.Module, batch: dict[str, Any], call: Callable[..., Any] | None = None, steps: int = STEPS
) -> Trained:
    """Train with AdamW on one batch; `call` is what is called in place of the model (a DDP around it)."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=EPSILON)
    losses = []
    for _ in range(steps):
        loss = loss_of((call or model)(**batch))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(mean(loss))
    return Trained(losses, {name: whole(p) for name, p in model.named_parameters()})


def mean(loss: torch.Tensor) -> float:
    """The mean of a loss over the ranks."""
    value = loss.detach().double().clone()
    if dist.is_initialized():
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return float(value)


def distance(found: Trained, wanted: Trained) -> float:
    """The largest relative difference of a loss, or that of all parameters taken as one vector."""
    losses = max(abs(a - b) / abs(b) for a, b in zip(found.losses, wanted.losses, strict=True))
    apart = size = 0.0
    for name, parameter in wanted.parameters.items():
        apart += float((found.parameters[name].double() - parameter.double()).square().sum())
        size += float(parameter.double().square().sum())
    return max(losses, (apart / size) ** 0.5)


def same_bits(found: Trained, wanted: Trained) -> list[str]:
    """Names of what differs in any bit."""
    names = [n for n, p in wanted.parameters.items() if not torch.equal(p, found.parameters[n])]
    return names + (["losses"] if found.losses != wanted.losses else [])


def differences(entry: Entry, plans: Sequence[str], rank: int, world: int) -> list[list[str]]:
    """Names of what differs in any bit, in training under each plan but the first, from training under that."""
    runs = []
    for plan in plans:
        torch.manual_seed(0)
        model = graphopt.compile(entry.build(), plan)
        runs.append(train(model, entry.part(entry.batch(), rank, world)))
    return [same_bits(run, runs[0]) for run in runs[1:]]
