"""A chain of small numeric stages, in one process or along a schedule over ranks."""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from graphopt.runtime.alarm import Alarm
from graphopt.runtime.execute import run
from graphopt.runtime.messages import TensorSpec
from graphopt.runtime.peers import Peers, peers_of
from graphopt.schedules.actions import Schedule
from graphopt.schedules.exchange import steps

WIDTH = 6


class Linear:
    """tanh(x @ weight) beside a mask, which goes along without a gradient, and an empty tensor; rows by microbatch.

    most: the most microbatches that were alive at once.
    """

    def __init__(self, index: int, stages: int) -> None:
        generator = torch.Generator().manual_seed(100 + index)
        self.weight = torch.randn(WIDTH, WIDTH, generator=generator)
        self.gradient = torch.zeros_like(self.weight)
        self.losses: dict[int, float] = {}
        self.most = 0
        self._is_first, self._is_last = index == 0, index == stages - 1
        self._saved: dict[int, tuple[torch.Tensor, ...]] = {}
        self._later: dict[int, torch.Tensor] = {}

    def forward(self, microbatch: int, received: list[torch.Tensor]) -> list[torch.Tensor]:
        x, mask, empty = _batch(microbatch) if self._is_first else received
        y = torch.tanh(x @ self.weight) * mask
        self._saved[microbatch] = (x, mask, y)
        self.most = max(self.most, len(self._saved))
        if self._is_last:
            self.losses[microbatch] = float(y.square().sum())
            return []
        return [y, mask, empty]

    def backward(self, microbatch: int, gradients: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
        found = self.input_gradients(microbatch, gradients)
        self.weight_gradients(microbatch)
        return found

    def input_gradients(self, microbatch: int, gradients: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
        _, mask, y = self._saved[microbatch]
        given = 2 * y if self._is_last else gradients[0]
        assert given is not None and gradients[1:] == ([] if self._is_last else [None, None])
        self._later[microbatch] = given * mask * (1 - y.square())
        return [] if self._is_first else [self._later[microbatch] @ self.weight.T, None, None]

    def weight_gradients(self, microbatch: int) -> None:
        x, _, _ = self._saved.pop(microbatch)
        self.gradient += x.T @ self._later.pop(microbatch)

    def incoming(self, microbatch: int) -> list[TensorSpec]:
        return [] if self._is_first else [TensorSpec.of(each) for each in _batch(microbatch)]

    def outgoing(self, microbatch: int) -> list[TensorSpec]:
        return [] if self._is_last else [TensorSpec.of(each) for each in _batch(microbatch)]

    def incoming_gradients(self, microbatch: int) -> list[bool]:
        return [] if self._is_first else [True, False, False]

    def outgoing_gradients(self, microbatch: int) -> list[bool]:
        return [] if self._is_last else [True, False, False]


def _batch(microbatch: int) -> list[torch.Tensor]:
    """float32 [rows, WIDTH], bool [rows, WIDTH] and an empty one; the rows differ."""
    generator = torch.Generator().manual_seed(microbatch)
    x = torch.randn(3 + microbatch % 2, WIDTH, generator=generator)
    return [x, torch.rand(x.shape, generator=generator) < 0.8, torch.empty(0, 2, dtype=torch.int64)]


def sequential(stages: int, orders: Sequence[Sequence[int]]) -> list[Linear]:
    """The chain in one process. orders: by stage, that in which its microbatches' gradients are added up."""
    chain = [Linear(index, stages) for index in range(stages)]
    for microbatch in range(len(orders[0])):
        values: list[torch.Tensor] = []
        for stage in chain:
            values = stage.forward(microbatch, values)
        gradients: list[torch.Tensor | None] = []
        for stage in reversed(chain):
            gradients = stage.input_gradients(microbatch, gradients)
    for stage, order in zip(chain, orders, strict=True):
        for microbatch in order:
            stage.weight_gradients(microbatch)
    return chain


def world_peers(alarm: Alarm, share_memory: bool) -> Peers:
    assert dist.group.WORLD is not None
    return peers_of(dist.group.WORLD, torch.device("cpu"), alarm.look, share_memory=share_memory)


def along(
    schedule: Schedule, peers: Peers, alarm: Alarm, made: Callable[[int, int], Linear] = Linear
) -> dict[int, Linear]:
    """This rank's stages after one step."""
    rank = dist.get_rank()
    chain = {index: made(index, schedule.stages) for index in schedule.stages_of(rank)}
    run(steps(schedule)[rank], chain, schedule.rank_of_stage, peers, alarm)
    return chain
