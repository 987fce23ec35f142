"""Where `forward` stops gradients, or lets them through again, the compiled module does."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

import graphopt
from graphopt import CaptureError
from tests.support.functions import doubled


class _Stops(nn.Module):
    """Two linear layers; what the first gives goes on through `stop`, as a factor."""

    def __init__(self, stop: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.stop = stop

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.second(x) * self.stop(self.first, x)).square().sum()


def _detach(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return layer(x).detach()


def _detach_before(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return layer(x.detach()) * 2


def _no_grad(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return layer(x) * 2


@torch.no_grad()
def _decorated(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return layer(x)


def _in_part(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        y = layer(x)
        with torch.enable_grad():
            z = layer(x)
    return y + z * layer(y)


def _in_place(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = layer(x)
    with torch.no_grad():
        scale = y.abs().amax().clamp_(min=1)
    return y / scale


def _mixed(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        y, largest = layer(x), x.argmax(1)
    return y.float() + largest.unsqueeze(1)


@pytest.mark.parametrize("stop", [_detach, _detach_before, _no_grad, _decorated, _in_part, _in_place, _mixed])
def test_gradients_stop_where_they_do_in_eager(stop: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> None:
    runs = []
    for is_compiled in (False, True):
        torch.manual_seed(0)
        model = _Stops(stop)
        if is_compiled:
            graphopt.compile(model)
        x = torch.randn(4, 3, requires_grad=True)
        model(x).backward()
        runs.append([x.grad, *(parameter.grad for parameter in model.parameters())])
    for wanted, found in zip(*runs, strict=True):
        assert (wanted is None) == (found is None)
        assert wanted is None or torch.equal(found, wanted)


def _data(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return layer(x).data * 2


def _data_of_a_weight(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return x * layer.weight.data.sum()


@pytest.mark.parametrize("stop", [_data, _data_of_a_weight])
def test_what_capture_cannot_see_is_refused_with_its_line(
    stop: Callable[[nn.Module, torch.Tensor], torch.Tensor],
) -> None:
    with pytest.raises(CaptureError, match=r"test_gradients\.py:\d+ reads a tensor through \.data.*\.detach\(\)"):
        graphopt.compile(_Stops(stop), example_inputs=(torch.randn(4, 3),))


def _written(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = layer(x)
    with torch.no_grad():
        y[:, 0] *= 2
    return y


def test_a_value_written_behind_the_back_of_autograd_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"test_gradients\.py:\d+ .*written under no_grad"):
        graphopt.compile(_Stops(_written), example_inputs=(torch.randn(4, 3),))


def _custom(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return doubled(layer(x))


def test_a_gradient_that_python_computes_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"test_gradients\.py:\d+ .*gradient of Doubled.*custom_op"):
        graphopt.compile(_Stops(_custom), example_inputs=(torch.randn(4, 3),))


class _Ends(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return doubled(super().forward(x))


def test_also_where_nothing_reads_it() -> None:
    with pytest.raises(CaptureError, match=r"gradient of Doubled"):
        graphopt.compile(_Ends(3, 3), example_inputs=(torch.randn(4, 3),))
    model = graphopt.compile(_Ends(3, 3))
    x = torch.randn(4, 3)
    with torch.no_grad():
        assert torch.equal(model(x), 2 * nn.functional.linear(x, model.weight, model.bias))
