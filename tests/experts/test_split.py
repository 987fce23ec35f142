"""Steps with experts, split inside a layer and sharded over the batch."""

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


def _train_sharded(rank: int, world: int) -> tuple[Trained, Trained]:
    """Without the router's losses, which each rank takes over its own tokens."""
    torch.manual_seed(1)
    batch = vectors(8)
    plan = Plan(mesh={"dp": world}, zero=Zero(3, whole_below=64))
    part = {"x": batch["x"].chunk(world)[rank]}
    return train(graphopt.compile(with_experts(0.0, shared=1), plan), part), train(with_experts(0.0, shared=1), batch)


def test_sharded_experts_train_as_eager_does_on_the_whole_batch(ranks) -> None:
    for found, wanted in ranks(2).run(_train_sharded):
        assert distance(found, wanted) <= BOUND
