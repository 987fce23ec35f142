"""One spelling for what capture may spell in several ways, with the values and the gradients of eager."""

import pytest
import torch
from torch import nn

import graphopt
from graphopt import Plan


class _Filled(nn.Module):
    """Copies a narrower value of another dtype into a new tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.row = nn.Parameter(torch.randn(3, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.zeros_like(x)
        y.copy_(self.row)
        return (x * y).sum()


@pytest.mark.parametrize("dynamic", [None, "batch"])
def test_a_copy_of_another_shape_is_cast_and_spread(dynamic: str | None) -> None:
    model, twin = _Filled(), _Filled()
    twin.load_state_dict(model.state_dict())
    graphopt.compile(model, Plan(dynamic=dynamic))
    for rows in (4, 2):
        x = torch.randn(rows, 3)
        losses = [each(x) for each in (model, twin)]
        for loss in losses:
            loss.backward()
        assert torch.equal(*losses)
        assert torch.equal(model.row.grad, twin.row.grad)
