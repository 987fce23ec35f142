"""Sequences are cut in balanced parts where causal attention can run on such; what is of positions comes out right."""

import re
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from graphopt.ir.context import ATTEND
from tests.support.split import eager_step, split_program
from tests.support.split_models import ATTENTION, MLPS, WIDTH, Batch, Blocks, tokens
from tests.support.zoo import ZOO

BOUND = 2e-6


class _Narrow(nn.Module):
    """Causal attention of two heads whose values are narrower than its keys."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(WIDTH, 2 * (8 + 8 + 5)), nn.Linear(10, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.unflatten(2, (2, -1)).transpose(1, 2) for part in self.qkv(x).split([16, 16, 10], -1))
        return self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class _Positions(nn.Module):
    """What a row becomes depends on where it is, on the row before it and on all that are before it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        place = torch.arange(x.shape[1], dtype=x.dtype) / x.shape[1]
        shifted = F.pad(x, (0, 0, 1, 0))[:, :-1]
        return x * place[:, None].cos() + shifted / 2 + x.cumsum(1) / 16


def _check(model: nn.Module, batch: Batch, ranks: int, order: str) -> None:
    program = split_program(model.train(), batch, ranks, ",along=sequence")
    assert program.statistics["order"].startswith(order)
    assert ("graphopt.attend.default" in program.calls) == order.startswith("balanced")
    assert program.run().distance(eager_step(model, batch)) <= BOUND


@pytest.mark.parametrize(("name", "ranks"), [("llama", 2), ("llama", 4), ("gpt2", 2)])
def test_models_of_transformers(name: str, ranks: int) -> None:
    torch.manual_seed(0)
    _check(ZOO[name].build(), ZOO[name].batch(), ranks, "balanced, for all 2 causal")


@pytest.mark.parametrize("attention", ["five heads", "one head of keys", "two heads of keys, grouped"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_heads(attention: str, ranks: int) -> None:
    torch.manual_seed(0)
    _check(Blocks(ATTENTION[attention](), MLPS["even"](), dropout=0.25), tokens(), ranks, "balanced, for all 1")


@pytest.mark.parametrize("attention", ["two heads of keys", "two heads of keys, grouped"])
def test_keys_are_gathered_before_they_are_repeated(attention: str) -> None:
    program = split_program(Blocks(ATTENTION[attention]()), tokens(), 2, ",along=sequence").program
    (attend,) = (node for node in program.compute_nodes() if node.target is ATTEND)
    query, keys, values = (node.meta["val"].shape[1] for node in attend.all_input_nodes)
    assert (query, keys, values) == (4, 2, 2)


def test_narrow_values() -> None:
    torch.manual_seed(0)
    _check(Blocks(_Narrow()), tokens(), 2, "balanced, for all 1")


def test_what_depends_on_the_place_of_a_row() -> None:
    torch.manual_seed(0)
    _check(Blocks(_Positions(), ATTENTION["fused"](), _Positions()), tokens(), 4, "balanced, for all 1")


OTHERWISE = [
    ([MLPS["even"]], 16, "that of the whole, for no attention is known to be causal"),
    ([ATTENTION["fused"]], 18, "that of the whole, for scaled.* cannot .* its 18 rows are not 4 equal chunks"),
    ([ATTENTION["fused"], ATTENTION["dropout"]], 16, "that of the whole, for scaled.* cannot .*: it drops scores"),
]


@pytest.mark.parametrize(("layers", "length", "why"), OTHERWISE)
def test_otherwise_rows_keep_their_order(layers: list[Callable[[], nn.Module]], length: int, why: str) -> None:
    torch.manual_seed(0)
    model, batch = Blocks(*(layer() for layer in layers)).train(), tokens(length=length)
    program = split_program(model, batch, 2, ",along=sequence")
    assert program.run().distance(eager_step(model, batch)) <= BOUND
    assert "graphopt.attend.default" not in program.calls
    assert re.match(why, program.statistics["order"])
