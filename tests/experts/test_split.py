"""Steps with experts, split inside a layer and sharded over the batch."""

from typing import Any

import pytest
import torch

import graphopt
from graphopt import Plan, Zero
from tests.support.experts import OPTIONS, vectors, with_experts
from tests.support.split import eager_step, split_program
from tests.support.training import Trained, distance, train

BOUND = 2e-6


@pytest.mark.parametrize(
    ("name", "ranks", "split"),
    [
        *((name, 2, "") for name in OPTIONS),
        ("by weight, with biases", 3, ",sequence=true"),
        ("by weight, with biases", 2, ",along=sequence"),
        ("plain, shared", 3, ",along=sequence"),
    ],
)
def test_a_split_step_gives_the_loss_the_gradients_and_the_biases_of_eager(name: str, ranks: int, split: str) -> None:
    batch = vectors()
    found = split_program(with_experts(**OPTIONS[name]), batch, ranks, split)
    assert "replicated" not in found.statistics
    assert found.run().distance(eager_step(with_experts(**OPTIONS[name]), batch)) <= BOUND


@pytest.mark.parametrize(("name", "ranks"), [("dropless", 4), ("capacity", 2), ("by weight, with biases", 4)])
def test_tokens_go_to_the_ranks_that_have_their_experts(name: str, ranks: int) -> None:
    """Room and biases are of all tokens, wherever they are."""
    batch = vectors()
    found = split_program(with_experts(**OPTIONS[name]), batch, ranks, ",along=experts")
    assert found.run().distance(eager_step(with_experts(**OPTIONS[name]), batch)) <= BOUND
    assert found.statistics["dispatch"] == found.statistics["combine"] == 1
    cut = {name: [split.dim for split in layout.splits] for name, layout in found.layouts.items() if layout.splits}
    assert cut == {"block.up": [0], "block.down": [0]}


def _trained(plan: Plan, batch: dict[str, torch.Tensor], factor: float, **options: Any) -> tuple[Trained, list[float]]:
    """After a few steps; and the biases."""
    model = graphopt.compile(with_experts(factor, **options), plan)
    found = train(model, batch)
    assert model.block.router.bias is not None
    return found, model.block.router.bias.tolist()


def _train_on_ranks(rank: int, world: int, options: dict[str, Any]) -> list[tuple[Trained, list[float]]]:
    torch.manual_seed(1)
    batch = vectors(8)
    plans = (Plan(mesh={"ep": world}), Plan(mesh={"dp": world}, zero=Zero(3, whole_below=64)))
    part = {"x": batch["x"].chunk(world)[rank]}
    return [_trained(plans[0], batch, 0.01, **options), _trained(plans[1], part, 0.0, **options)]


@pytest.mark.long
def test_training_on_two_ranks_is_that_of_eager_on_the_whole_batch(ranks) -> None:
    """With the router's losses where the batch is not cut: each rank takes them over its own tokens."""
    options = {**OPTIONS["plain, shared"], "bias_speed": 1e-6}
    answers = ranks(2).run(_train_on_ranks, options)
    torch.manual_seed(1)
    batch = vectors(8)
    for place, factor in enumerate((0.01, 0.0)):
        model = with_experts(factor, **options)
        wanted = train(model, batch)
        for answer in answers:
            assert distance(answer[place][0], wanted) <= BOUND
            if place == 0:
                assert answer[place][1] == model.block.router.bias.tolist()
