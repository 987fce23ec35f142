"""Forward and backward in one graph, whatever the sizes are."""

import torch
from torch import nn

import graphopt


class _Addcmul(nn.Module):
    """An operator that asks for numbers where sizes are symbols, unless it runs in Python."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addcmul(x, self.weight, self.weight, value=0.5).square().sum()


def test_sizes_stay_symbolic_in_operators_that_want_numbers() -> None:
    model, twin = _Addcmul(), _Addcmul()
    twin.load_state_dict(model.state_dict())
    graphopt.compile(model, "dynamic=batch")
    for rows in (2, 5):
        x = torch.randn(rows, 3)
        for each in (model, twin):
            each.zero_grad()
            each(x).backward()
        assert torch.equal(model.weight.grad, twin.weight.grad)


class _Transposed(nn.Module):
    """A product that torch folds into one of two dimensions if its weight wants a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.transpose(0, 1))


def test_evaluation_runs_the_kernels_of_eager() -> None:
    model, twin = _Transposed().eval(), _Transposed().eval()
    twin.load_state_dict(model.state_dict())
    graphopt.compile(model)
    with torch.no_grad():
        for _ in range(5):
            x = torch.randn(3, 5, 4)
            assert torch.equal(model(x), twin(x))
