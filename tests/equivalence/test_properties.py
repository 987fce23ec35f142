"""Any small module, any stage, any number of ranks: no farther from float64 than eager, by more than a small factor."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import graphopt
from graphopt import Plan, Zero
from tests.support.ranks import Ranks
from tests.support.training import whole

ROWS = 4
FACTOR, FLOOR = 4.0, 1e-6


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer: its kind, its output width, and what is peculiar about it."""

    kind: str
    width: int
    bias: bool
    frozen: bool
    repeat: int


@dataclasses.dataclass(frozen=True)
class Case:
    """A module and a plan for it."""

    width: int
    layers: tuple[Layer, ...]
    tied: bool
    extra: int
    zero: Zero

    def build(self) -> "Drawn":
        torch.manual_seed(0)
        return Drawn(self)


class Drawn(nn.Module):
    """The module of a case."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        self.blocks = nn.ModuleList()
        width = case.width
        for layer in case.layers:
            self.blocks.append(_block(layer, width))
            width = layer.width if layer.kind == "linear" else width
        self.unused = nn.Parameter(torch.randn(case.extra, 3))
        if case.tied:
            self.twin = nn.Linear(self.blocks[0].in_features, self.blocks[0].out_features)  # type: ignore[arg-type]
            self.twin.weight = self.blocks[0].weight  # type: ignore[assignment]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index, (layer, block) in enumerate(zip(self.case.layers, self.blocks, strict=True)):
            if index == 0 and self.case.tied:
                x = torch.tanh(block(x) + self.twin(x))
                continue
            for _ in range(layer.repeat if layer.kind != "linear" else 1):
                x = torch.tanh(block(x))
        return F.softplus(x).mean()


def _block(layer: Layer, width: int) -> nn.Module:
    block: nn.Module
    if layer.kind == "linear":
        block = nn.Linear(width, layer.width, bias=layer.bias)
    elif layer.kind == "norm":
        block = nn.LayerNorm(width)
    else:
        block = nn.Sequential(
            nn.Unflatten(1, (1, width)), nn.Conv1d(1, 1, 3, padding=1, bias=layer.bias), nn.Flatten(1)
        )
    for parameter in block.parameters():
        parameter.requires_grad_(not layer.frozen)
    return block


layers = st.builds(
    Layer,
    kind=st.sampled_from(["linear", "norm", "conv"]),
    width=st.integers(1, 9),
    bias=st.booleans(),
    frozen=st.booleans(),
    repeat=st.integers(1, 3),
)
first = st.builds(Layer, st.just("linear"), st.integers(1, 9), st.booleans(), st.just(False), st.just(1))
cases = st.builds(
    lambda width, head, rest, tied, extra, zero: Case(width, (head, *rest), tied, extra, zero),
    st.integers(1, 9),
    first,
    st.lists(layers, max_size=4),
    st.booleans(),
    st.integers(0, 5),
    st.builds(
        Zero,
        stage=st.integers(0, 3),
        bucket_bytes=st.sampled_from([None, 1, 256]),
        prefetch=st.integers(0, 3),
        whole_below=st.sampled_from([0, 64, 4096]),
        keep_gathered=st.booleans(),
    ),
)


def gradients(rank: int, world: int, case: Case) -> dict[str, torch.Tensor | None]:
    """Whole gradients of one compiled step; each rank has its rows."""
    model = case.build()
    model.train()
    x = torch.randn(ROWS, case.width)[rank * ROWS // world : (rank + 1) * ROWS // world]
    graphopt.compile(model, Plan(zero=case.zero, verify=True))(x).backward()
    return {name: None if p.grad is None else whole(p.grad) for name, p in model.named_parameters()}


def check(found: dict[str, Any], case: Case) -> None:
    """Compare with eager in float32 and in float64 on the whole batch."""
    eager = case.build()
    exact = copy.deepcopy(eager).double()
    x = torch.randn(ROWS, case.width)
    eager(x).backward()
    exact(x.double()).backward()
    references = dict(exact.named_parameters())
    for name, parameter in eager.named_parameters():
        assert (found[name] is None) == (parameter.grad is None), name
        if parameter.grad is not None:
            reference = references[name].grad
            assert reference is not None
            allowed = FACTOR * float((parameter.grad.double() - reference).norm()) + FLOOR * (
                1 + float(reference.norm())
            )
            assert float((found[name].double() - reference).norm()) <= allowed, name


@given(case=cases)
def test_one_rank(case: Case) -> None:
    check(gradients(0, 1, case), case)


@pytest.mark.parametrize("world", [2, 4])
def test_several_ranks(ranks, world: int) -> None:
    _on_ranks(ranks(world), examples=15)


@pytest.mark.long
@pytest.mark.parametrize("world", [2, 4])
def test_several_ranks_for_long(ranks, world: int) -> None:
    _on_ranks(ranks(world), examples=500)


def _on_ranks(pool: Ranks, examples: int) -> None:
    @settings(max_examples=examples)
    @given(case=cases)
    def each(case: Case) -> None:
        for found in pool.run(gradients, case):
            check(found, case)

    each()
