"""Dropout draws what eager draws, however its input lies in memory."""

import pytest
import torch
from torch import fx, nn

import graphopt
from graphopt.capture.arguments import flatten_call
from graphopt.capture.export import capture


class Dropping(nn.Module):
    def __init__(self, inplace: bool, transposed: bool) -> None:
        super().__init__()
        self.scale = nn.Linear(5, 5)
        self.drop = nn.Dropout(0.5, inplace=inplace)
        self.transposed = transposed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.scale(x)
        x = self.drop((x.t().contiguous().t() if self.transposed else x) * 2)
        return (x * x).sum()


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_draws_come_in_the_order_of_eager(inplace: bool, transposed: bool) -> None:
    model, x = Dropping(inplace, transposed), torch.randn(4, 5)
    tensors, spec = flatten_call((x,), {})
    program = capture(model, tensors, spec, ["x"]).program
    state = dict(model.named_parameters())
    inputs = [state.get(role.name, x) for role in program.inputs]
    torch.manual_seed(3)
    wanted = model(x)
    torch.manual_seed(3)
    assert torch.equal(fx.Interpreter(program.module).run(*inputs)[0], wanted)
    wanted.backward()
    gradient = model.scale.weight.grad.clone()
    model.zero_grad()
    torch.manual_seed(3)
    graphopt.compile(model)(x).backward()
    assert torch.equal(model.scale.weight.grad, gradient)
