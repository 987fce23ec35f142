"""Programs are made for tensors as they lie in memory."""

import pytest
import torch
from torch import nn

import graphopt
from graphopt import Plan
from graphopt.inspect.differential import check


class _Flattened(nn.Module):
    """Reads a transposed parameter, one with gaps, and its input, each as a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.transposed = nn.Parameter(torch.randn(3, 4).t())
        self.gaps = nn.Parameter(torch.randn(4, 6)[:, ::2])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x.reshape(-1) * self.transposed.reshape(-1)).sum() + (self.gaps.reshape(-1) * x.flatten()).tanh().sum()


def test_parameters_and_inputs_of_any_strides() -> None:
    model, twin = _Flattened(), _Flattened()
    twin.load_state_dict(model.state_dict())
    graphopt.compile(model)
    for x in (torch.randn(4, 3), torch.randn(3, 4).t(), torch.randn(4, 6)[:, 1::2], torch.randn(3).expand(4, 3)):
        for each in (model, twin):
            each.zero_grad()
            each(x).backward()
        for one, other in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(one.grad, other.grad)


@pytest.mark.parametrize("text", ["zero=0", "zero=3,zero.whole_below=0", "zero=2,precision=bf16"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_strided_parameters_under_every_plan(text: str, ranks: int) -> None:
    verdict = check(_Flattened(), (torch.randn(3, 4).t(),), {}, Plan.parse(text).resolve(ranks))
    assert verdict.guilty is None, verdict


def test_strided_parameters_compute_in_another_dtype() -> None:
    model = graphopt.compile(_Flattened(), "precision=bf16")
    model(torch.randn(3, 4).t()).backward()
    assert all(parameter.grad.dtype is torch.float32 for parameter in model.parameters())
