"""Attributes that `forward` assigns: buffers get their new values, what cannot be kept is refused."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

import graphopt
from graphopt import CaptureError


class _Assigns(nn.Module):
    def __init__(self, assign: Callable[[nn.Module, torch.Tensor], None]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))
        self.assign = assign

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        before = self.mean
        self.assign(self, x)
        return x * self.mean + before


def _blend(module: nn.Module, x: torch.Tensor) -> None:
    module.mean = 0.5 * module.mean + x.detach().mean(0)


def _twice(module: nn.Module, x: torch.Tensor) -> None:
    module.mean = module.mean + 1
    module.mean = module.mean * 2


def _in_place_first(module: nn.Module, x: torch.Tensor) -> None:
    module.mean.add_(1)
    module.mean = module.mean * 2


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("assign", [_blend, _twice, _in_place_first])
def test_an_assigned_buffer_has_the_value_of_eager(
    assign: Callable[[nn.Module, torch.Tensor], None], depth: int
) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(*[nn.Linear(3, 3)] * depth, _Assigns(assign))

    model, twin = graphopt.compile(build()), build()
    for rows in (4, 4, 2):
        x = torch.randn(rows, 3)
        assert torch.equal(model(x), twin(x))
        assert all(torch.equal(a, b) for a, b in zip(model.buffers(), twin.buffers(), strict=True))


def _plain(module: nn.Module, x: torch.Tensor) -> None:
    module.seen = x.detach()


def _wider(module: nn.Module, x: torch.Tensor) -> None:
    module.mean = (module.mean + x[0].detach()).double()


def _registers(module: nn.Module, x: torch.Tensor) -> None:
    module.register_buffer("seen", x.detach())


@pytest.mark.parametrize(
    ("assign", "message"),
    [
        (_registers, "keeps a tensor in 1.seen, which was no buffer before; register it"),
        (_plain, "keeps a tensor in 1.seen, which was no buffer before; register it"),
        (_wider, r"makes torch.float64 \[3\] of the buffer 1.mean, which is torch.float32 \[3\]"),
    ],
)
def test_what_a_program_cannot_keep_is_refused(assign: Callable[[nn.Module, torch.Tensor], None], message: str) -> None:
    model = nn.Sequential(nn.Linear(3, 3), _Assigns(assign))
    held = model[1].mean
    with pytest.raises(CaptureError, match=message):
        graphopt.compile(model, example_inputs=(torch.randn(4, 3),))
    assert model[1].mean is held and not hasattr(model[1], "seen")


def test_an_assigned_buffer_of_two_names_is_refused() -> None:
    model = nn.Sequential(_Assigns(_blend))
    model[0].register_buffer("twin", model[0].mean)
    with pytest.raises(CaptureError, match=r"assigns the buffer 0\.mean, which has other names that keep the old one"):
        graphopt.compile(model, example_inputs=(torch.randn(4, 3),))
