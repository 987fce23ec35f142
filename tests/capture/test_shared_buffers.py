"""Buffers under several names are one: what is changed through one of them is seen through all, as in eager."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

import graphopt


class _Twice(nn.Module):
    """One batch norm in two places, and its running mean as a buffer of the model's own."""

    def __init__(self) -> None:
        super().__init__()
        norm = nn.BatchNorm1d(3)
        self.layers = nn.ModuleList([nn.Linear(3, 3), norm, nn.Linear(3, 3), norm])
        self.register_buffer("mean", norm.running_mean)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x - self.mean


class _Renamed(nn.Module):
    """Changes a buffer in place through one name and through the other, and reads both."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("one", torch.ones(3))
        self.register_buffer("other", self.one)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.one.add_(1)
        x = x * self.other
        self.other.mul_(2)
        return x + self.one


@pytest.mark.parametrize("build", [_Twice, _Renamed])
def test_one_buffer_under_several_names(build: Callable[[], nn.Module]) -> None:
    model, twin = build(), build()
    twin.load_state_dict(model.state_dict())
    held = [id(buffer) for _, buffer in model.named_buffers(remove_duplicate=False)]
    graphopt.compile(model)
    for _ in range(2):
        x = torch.randn(4, 3)
        assert torch.equal(model(x), twin(x))
        assert all(torch.equal(a, b) for a, b in zip(model.buffers(), twin.buffers(), strict=True))
    assert [id(buffer) for _, buffer in model.named_buffers(remove_duplicate=False)] == held
