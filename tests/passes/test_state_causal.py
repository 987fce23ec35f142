"""Attention under a causal mask that is made of no input is called without it, and gives the same bits."""

import copy

import pytest
import torch
from torch import fx, nn

import graphopt
from graphopt._torch import argument
from graphopt.ir import Program
from graphopt.lowering import lower
from graphopt.passes.causal_masks import ATTENTION
from graphopt.plan import Plan
from tests.support.zoo import ZOO


class _Attention(nn.Module):
    """Each query sees as many keys as the window is wide, up to its own."""

    def __init__(self, window: int) -> None:
        super().__init__()
        self.project = nn.Linear(8, 24)
        self.window = window

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.project(x)[:, None].chunk(3, -1)
        at = torch.arange(x.shape[1])
        mask = (at[None] <= at[:, None]) & (at[None] > at[:, None] - self.window)
        return nn.functional.scaled_dot_product_attention(query, key, value, mask).sum()


def _given(model: nn.Module, **batch: torch.Tensor) -> list[tuple[object, object]]:
    """The mask of each attention call before the forward graph is differentiated, and whether it says it is causal."""
    found: list[tuple[object, object]] = []

    def look(record: object, program: Program) -> None:
        calls = [node for node in program.compute_nodes() if node.target is ATTENTION]
        if calls:
            found[:] = [(_argument(call, "attn_mask"), _argument(call, "is_causal")) for call in calls]

    lower(model, (), batch, Plan().resolve(1), observer=look)
    return found


def _argument(call: fx.Node, name: str) -> object:
    return argument(ATTENTION, name, call.args, call.kwargs)


@pytest.mark.parametrize(("window", "is_causal"), [(6, True), (3, False)])
def test_a_mask_that_is_causal_is_stated(window: int, is_causal: bool) -> None:
    ((mask, stated),) = _given(_Attention(window), x=torch.randn(2, 6, 8))
    assert (mask is None, bool(stated)) == (is_causal, is_causal)


@pytest.mark.parametrize("window", [6, 3])
def test_bits_are_those_of_the_mask(window: int) -> None:
    model, x = _Attention(window), torch.randn(2, 6, 8)
    twin = copy.deepcopy(model)
    graphopt.compile(model)
    for each in (model, twin):
        each(x).backward()
    assert torch.equal(model.project.weight.grad, twin.project.weight.grad)


def test_a_model_of_transformers_keeps_no_mask() -> None:
    entry = ZOO["llama"]
    assert set(_given(entry.build(), **entry.batch())) == {(None, True)}
