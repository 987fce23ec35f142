"""Operators of kernels in a compiled model: one node each, forward and backward, and the values of eager."""

import copy

import pytest
import torch
from torch import nn

import graphopt
from graphopt.triton_kernels.activations.op import BIAS_ACTIVATION, BIAS_ACTIVATION_BACKWARD, GATED, GATED_BACKWARD
from graphopt.triton_kernels.cross_entropy.op import CROSS_ENTROPY, CROSS_ENTROPY_BACKWARD
from graphopt.triton_kernels.norms.op import (
    ADD_LAYER_NORM,
    LAYER_NORM_BACKWARD,
    RMS_NORM,
    RMS_NORM_BACKWARD,
)
from graphopt.triton_kernels.quantization.linear import quantize_linear
from graphopt.triton_kernels.quantization.scaled.op import DYNAMIC_LINEAR, QUANTIZE_ROWS
from tests.support.programs import lowered


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.shift = nn.Parameter(torch.ones(16)), nn.Parameter(torch.zeros(16))
        self.up, self.down = nn.Linear(16, 64), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.up(RMS_NORM(x, self.weight, 1e-6, 0.0, False)[0]).chunk(2, -1)
        y = self.down(GATED(gate, up, "silu"))
        y, total, _, _ = ADD_LAYER_NORM(y, x, self.weight, self.shift, 1e-5)
        return BIAS_ACTIVATION(y, self.shift, "gelu") + total


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer() for _ in range(2))
        self.head = nn.Linear(16, 10, bias=False)

    def forward(self, x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return CROSS_ENTROPY(self.head(x), targets, -100, 0.1, 1e-4)[0].mean()


class _QuantizedLayer(nn.Module):
    """Weights of four bits that are constants, an input that becomes int8, and a layer that is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.trained = quantize_linear(nn.Linear(16, 32), bits=4, group=8), nn.Linear(8, 16)
        weight, scales = QUANTIZE_ROWS(torch.randn(8, 32), torch.int8)
        self.register_buffer("weight", weight)
        self.register_buffer("scales", scales)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = x + self.trained(DYNAMIC_LINEAR(self.up(x), self.weight, self.scales, None))
        return y


class _Quantized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList(_QuantizedLayer() for _ in range(2)), nn.Linear(16, 10)

    def forward(self, x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), targets.flatten())


def _batch(rows: int) -> dict[str, torch.Tensor]:
    return {"x": torch.randn(rows, 6, 16), "targets": torch.randint(10, (rows, 6))}


def test_operators_are_one_node_a_layer_each_way() -> None:
    _, program = lowered("zero=3", 2, _Model(), **_batch(2))
    names = [str(node.target) for node in program.graph.nodes if str(node.target).startswith("graphopt.")]
    for operator in (RMS_NORM, GATED, ADD_LAYER_NORM, BIAS_ACTIVATION):
        assert names.count(str(operator)) == 2
    for operator in (RMS_NORM_BACKWARD, GATED_BACKWARD, LAYER_NORM_BACKWARD, BIAS_ACTIVATION_BACKWARD):
        assert names.count(str(operator)) == 2
    assert names.count(str(CROSS_ENTROPY)) == names.count(str(CROSS_ENTROPY_BACKWARD)) == 1


@pytest.mark.parametrize("make", [_Model, _Quantized])
@pytest.mark.parametrize("plan", ["zero=0", "dynamic=batch", "remat=full"])
def test_a_compiled_model_computes_what_eager_does(plan, make) -> None:
    model = make()
    compiled = graphopt.compile(copy.deepcopy(model), plan)
    for rows in (2, 3):
        batch = _batch(rows)
        model.zero_grad()
        compiled.zero_grad()
        found, wanted = compiled(**batch), model(**batch)
        found.backward()
        wanted.backward()
        assert torch.equal(found, wanted)
        for one, other in zip(compiled.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-6, atol=1e-7)
