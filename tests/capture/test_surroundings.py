"""What is compiled during backward computes what the call before it did."""

import pytest
import torch
from torch import nn

import graphopt


class _TwoOutputs(nn.Module):
    """A scalar and a matrix: a gradient is expected at the scalar. What `still` gives has none."""

    def __init__(self) -> None:
        super().__init__()
        self.still, self.moving = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            factor = self.still(x)
        y = self.moving(x) * factor
        return y.sum(), y


def _gradients(model: nn.Module, region: torch.dtype | None) -> list[torch.Tensor | None]:
    with torch.autocast("cpu", region, enabled=region is not None):
        _, y = model(torch.randn(4, 3, generator=torch.Generator().manual_seed(1)))
    y.square().sum().backward()  # where no gradient was expected
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("region", [None, torch.bfloat16])
def test_recompiled_in_backward(region: torch.dtype | None) -> None:
    runs = []
    for is_compiled in (False, True):
        torch.manual_seed(0)
        model = _TwoOutputs()
        runs.append(_gradients(graphopt.compile(model) if is_compiled else model, region))
    for wanted, found in zip(*runs, strict=True):
        assert (wanted is None) == (found is None)
        assert wanted is None or torch.equal(found, wanted)


def _kept_back(rank: int, world: int) -> bool:
    """Whether the layer under no_grad stays without a gradient when the first backward is inside no_sync."""
    torch.manual_seed(0)
    model = graphopt.compile(_TwoOutputs(), "dp=2,zero=1")
    with graphopt.no_sync(model):
        model(torch.randn(4, 3))[0].backward()
    model(torch.randn(4, 3))[0].backward()
    return model.still.weight.grad is None and model.moving.weight.grad is not None


def test_compiled_in_backward_to_keep_gradients_back(ranks) -> None:
    assert ranks(2).run(_kept_back) == [True, True]
