"""Training with layers split over ranks equals eager training, for every architecture and ZeRO stage."""

import pytest
import torch

import graphopt
from tests.support.training import Trained, distance, train
from tests.support.zoo import ZOO

BOUND = 2e-6


def _train(rank: int, world: int, name: str, plans: list[str]) -> tuple[list[Trained], Trained]:
    entry = ZOO[name]
    results = []
    for plan in plans:
        torch.manual_seed(0)
        model, batch = entry.build().train(), entry.batch()
        compiled = graphopt.compile(model, plan)
        data_ranks = int(plan[3]) if plan.startswith("dp=") else 1
        results.append(train(compiled, entry.part(batch, rank // (world // data_ranks), data_ranks)))
    torch.manual_seed(0)
    model, batch = entry.build().train(), entry.batch()
    return results, train(model, batch)


@pytest.mark.parametrize("name", ZOO)
def test_split_layers_train_as_eager_does(ranks, name: str) -> None:
    plans = ["tp=2"]
    for found, eager in ranks(2).run(_train, name, plans):
        assert [distance(each, eager) for each in found] <= [BOUND] * len(plans)


@pytest.mark.parametrize("name", ZOO)
def test_split_layers_train_in_every_zero_stage(ranks, name: str) -> None:
    plans = [f"dp=2,tp=2,zero={stage},zero.whole_below=64" for stage in range(4)] + ["tp=4"]
    for found, eager in ranks(4).run(_train, name, plans):
        for plan, each in zip(plans, found, strict=True):
            assert distance(each, eager) <= BOUND, plan
