"""Training by steps of a plan, and the same steps in one eager process, microbatch by microbatch."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

import graphopt
from graphopt import Plan
from graphopt.engines.microbatches import joined, microbatches
from tests.support.training import EPSILON, STEPS, Trained, mean, whole
from tests.support.unet import UNet, squared_error
from tests.support.zoo import ZOO, loss_of


@dataclass
class Case:
    """A model with the loss and the batch of its steps; batch: what `train_step` takes, target: beside it."""

    model: nn.Module
    batch: dict[str, torch.Tensor]
    target: torch.Tensor | None = None

    @classmethod
    def of(cls, name: str) -> "Case":
        torch.manual_seed(0)
        if name == "unet":
            return cls(UNet(), {"x": torch.randn(8, 3, 16, 16)}, torch.randn(8, 3, 16, 16))
        return cls(ZOO[name].build().train(), ZOO[name].batch())

    @property
    def loss(self) -> Any:
        return squared_error if self.target is not None else None

    def part(self, place: int, replicas: int) -> "Case":
        """What one data-parallel rank sees."""
        rows = {name: value.tensor_split(replicas)[place] for name, value in self.batch.items()}
        target = None if self.target is None else self.target.tensor_split(replicas)[place]
        return Case(self.model, rows, target)


def place_of(plan: Plan, rank: int) -> int:
    """A rank's place along the data-parallel axis of a resolved plan."""
    for axis, size in reversed(list(plan.mesh.items())):
        if axis == plan.data_parallel_axis:
            return rank % size
        rank //= size
    return 0


def by_steps(name: str, text: str, rank: int, world: int, steps: int = STEPS) -> Trained:
    """Training under a plan; the parameters are those that lie on this rank, whole."""
    plan = Plan.parse(text).resolve(world)
    case = Case.of(name)
    mine = case.part(place_of(plan, rank), plan.data_parallel_ranks)
    model = graphopt.compile(case.model, plan, loss=case.loss)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=EPSILON)
    losses = []
    for _ in range(steps):
        losses.append(mean(model.train_step(mine.batch, mine.target)))
        optimizer.step()
        optimizer.zero_grad()
    return Trained(losses, {name: whole(p) for name, p in model.named_parameters() if is_here(p)})


def is_here(parameter: torch.Tensor) -> bool:
    """Whether this rank has a part of it."""
    return not isinstance(parameter, DTensor) or parameter.device_mesh.get_coordinate() is not None


def eagerly(name: str, replicas: int, count: int, steps: int = STEPS) -> Trained:
    """Training by the model itself, whose gradients are added up over `count` microbatches of each replica's part."""
    case = Case.of(name)
    optimizer = torch.optim.AdamW(case.model.parameters(), lr=1e-3, eps=EPSILON)
    losses = []
    for _ in range(steps):
        of_replicas = []
        for place in range(replicas):
            part = case.part(place, replicas)
            rows = [*part.batch.values(), *([] if part.target is None else [part.target])]
            pieces, found = microbatches(rows, count), []
            for piece in pieces:
                output = case.model(**dict(zip(part.batch, piece.tensors, strict=False)))
                loss = loss_of(output) if part.target is None else squared_error(output, piece.tensors[-1])
                (loss * (piece.share / replicas)).backward()
                found.append(loss.detach())
            of_replicas.append(float(joined(found, pieces)))
        losses.append(sum(of_replicas) / replicas)
        optimizer.step()
        optimizer.zero_grad()
    return Trained(losses, {name: whole(p) for name, p in case.model.named_parameters()})


def only_here(found: Trained, wanted: Trained) -> Trained:
    """Of `wanted` the parameters that `found` has."""
    return Trained(wanted.losses, {name: wanted.parameters[name] for name in found.parameters})
