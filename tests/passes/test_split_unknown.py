"""Operators without a signature run whole on every rank, and that is said."""

import logging

import pytest
import torch
from torch import nn

from tests.support.split import split_program


class _Diagonal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.diagonal(self.down(torch.relu(self.up(x)))).square().mean()


def test_what_is_unknown_is_named(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model, x = _Diagonal(), torch.randn(4, 8)
    with caplog.at_level(logging.WARNING, logger="graphopt.passes.split"):
        split = split_program(model, {"x": x}, 2)
    assert "every rank of tp runs aten.diagonal.default whole" in caplog.text
    assert split.statistics["split"] == 2
    assert split.run().users[0].allclose(model(x))
