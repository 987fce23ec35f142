"""Experts over an axis: tokens go to the ranks that have them, whatever the routing; gradients are those of eager."""

from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import nn

from graphopt.cost.communication import communication
from graphopt.dimensions.strategies import even_chunk
from graphopt.errors import PassError
from tests.support.architectures import ARCHITECTURES
from tests.support.expert_models import Routed, Tower, vectors
from tests.support.split import SplitProgram, eager_step, split_program
from tests.support.zoo import ZOO

BOUND = 2e-6
LENGTH = 6


def _split(
    build: Callable[[], nn.Module], batch: dict[str, Any], ranks: int, options: str = ",along=experts"
) -> tuple[SplitProgram, float]:
    torch.manual_seed(0)
    model = build().train()
    split = split_program(model, batch, ranks, options)
    return split, split.run().distance(eager_step(model, batch))


@pytest.mark.parametrize(("name", "ranks"), [("mixtral", 2), ("mixtral", 4), ("qwen3_moe", 2), ("qwen3_moe", 4)])
def test_models_of_transformers_as_they_come(name: str, ranks: int) -> None:
    entry = (ZOO | ARCHITECTURES)[name]
    split, distance = _split(entry.build, entry.batch(), ranks)
    assert distance <= BOUND
    experts = {name: layout.splits for name, layout in split.layouts.items() if layout.splits}
    assert experts and all("experts" in name and splits[0].dim == 0 for name, splits in experts.items())
    moved = split.statistics
    assert moved["dispatch"] == moved["combine"] == moved["products"] // 2  # one pair for the two products of a layer
    assert moved["gather"] == 1  # the logits
    config = split.model.config
    rows = entry.batch()["input_ids"].numel() * config.num_experts_per_tok
    bytes_a_way = 4 * rows // ranks * config.hidden_size * (ranks - 1) / ranks  # of float32, where loads are equal
    layers, found = config.num_hidden_layers, communication(split.program, {"tp": ranks}).bytes
    assert found["dispatch", "tp"] == found["combine", "tp"] == layers * 2 * bytes_a_way  # there and back


@pytest.mark.parametrize(
    "block",
    [
        lambda: Routed(4),
        lambda: Routed(4, spelling="argsort"),
        lambda: Routed(4, top=1, favourite=3),  # every other expert has no token, every other rank no row
        lambda: Routed(8, top=3, favourite=0),
        lambda: Routed(4, biased=False),  # what is between the products is in no other order
        lambda: Routed(5),  # one rank has three experts, one has two
        lambda: Routed(5, dropped=True),  # as with a capacity: some rows go nowhere
    ],
)
@pytest.mark.parametrize("batch", [4, 5])  # of the part of five rows, one is filled up
def test_routing_of_any_kind(block: Callable[[], nn.Module], batch: int) -> None:
    split, distance = _split(lambda: Tower(block(), block()), vectors(batch, 3), 2)
    assert distance <= BOUND and split.statistics["dispatch"] >= 2


@st.composite
def routed(draw: st.DrawFn) -> Routed:
    experts = draw(st.integers(2, 9))
    top = draw(st.integers(1, experts))
    favourite = draw(st.none() | st.integers(0, experts - 1))
    dropped = experts > 2 and draw(st.booleans())
    return Routed(experts, top, favourite, dropped, draw(st.sampled_from(["sort", "argsort"])), draw(st.booleans()))


@pytest.mark.long
@hypothesis.settings(max_examples=60)
@hypothesis.given(st.lists(routed(), min_size=1, max_size=2), st.integers(2, 4), st.integers(4, 7), st.booleans())
def test_drawn_experts(blocks: list[Routed], ranks: int, batch: int, along: bool) -> None:
    options = ",along=experts" if along else ",along=sequence"
    try:
        _, distance = _split(lambda: Tower(*blocks), vectors(batch, LENGTH), ranks, options)
    except PassError as error:  # a rank would have no expert, or no row
        assert "nothing can be split" in str(error)
        fewest = min(block.experts - block.dropped for block in blocks)
        assert None in {even_chunk(size, ranks) for size in ([batch, fewest] if along else [LENGTH])}
        return
    assert distance <= BOUND


def test_tokens_are_sorted_where_they_are_if_experts_are_whole() -> None:
    split, distance = _split(lambda: Tower(Routed(4)), vectors(), 2, ",along=sequence")
    assert distance <= BOUND and not {"dispatch", "gather"} & split.statistics.keys()


@pytest.mark.parametrize(
    ("build", "ranks", "said"),
    [
        (lambda: Tower(Routed(4)), 8, "none of the 2 products of rows by group .* on 8 parts; choose tp=4"),
        (lambda: Tower(nn.Linear(16, 16)), 2, "none of the 0 products of rows by group .* choose tp=1"),
    ],
)
def test_what_cannot_be_split_says_what_could(build: Callable[[], nn.Module], ranks: int, said: str) -> None:
    with pytest.raises(PassError, match=said):
        _split(build, vectors(8), ranks)
