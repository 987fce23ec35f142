"""Parameters that ranks hold alike are alike in every bit, after training too; which are not, one is told."""

import pytest
import torch
from torch.distributed.tensor import DTensor

import graphopt
from graphopt import Plan, RankMismatchError
from tests.support.training import train
from tests.support.zoo import ZOO

PLANS = [
    "dp=2,tp=2,zero=0",
    "dp=2,tp=2,zero=3",
    "tp=2,cp=2",
    "dp=2,cp=2,zero=2,zero.whole_below=0",
    "ep=2,tp=2",
    "dp=2,ep=2,zero=1,zero.whole_below=0",
]


def _trained(rank: int, world: int) -> list[int]:
    """How many parameters were held alike over some axis, of which the check has found none to differ."""
    found = []
    for text in PLANS:
        torch.manual_seed(0)
        entry = ZOO["mixtral"]
        plan = Plan.parse(text).resolve(world)
        model = graphopt.compile(entry.build().train(), plan)
        train(model, entry.part(entry.batch(), rank * plan.data_parallel_ranks // world, plan.data_parallel_ranks))
        graphopt.check_replicas(model)
        parameters = [p for p in model.parameters() if isinstance(p, DTensor)]
        found.append(sum(any(placement.is_replicate() for placement in p.placements) for p in parameters))
    return found


def test_training_keeps_replicas_alike(ranks) -> None:
    assert all(all(found) for found in ranks(4).run(_trained))


def _changed(rank: int, world: int) -> str:
    model = graphopt.compile(torch.nn.Linear(4, 4), "dp=2,zero=0")
    graphopt.check_replicas(model)
    if rank == 1:
        with torch.no_grad():
            assert isinstance(model.weight, DTensor)
            model.weight.to_local()[2, 3] += 1e-6
    with pytest.raises(RankMismatchError) as caught:
        graphopt.check_replicas(model)
    return str(caught.value)


def test_one_bit_that_differs_is_named(ranks) -> None:
    wanted = "what the ranks of dp should have alike is not: weight differs from that of rank 0 on rank 1"
    assert ranks(2).run(_changed) == [wanted, wanted]
