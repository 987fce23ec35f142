"""Split programs of symbolic sizes: one for batches of several sizes, whose losses and gradients are those of eager."""

import logging

import pytest
import torch

import graphopt
from tests.support.training import whole
from tests.support.zoo import ZOO, loss_of

BATCHES = (8, 5, 3)


def _steps(rank: int, world: int, plan: str) -> list[float]:
    """Of each batch the largest relative difference of the loss, or of all gradients taken as one vector."""
    entry = ZOO["llama"]
    torch.manual_seed(0)
    eager, batch = entry.build(), entry.batch()
    torch.manual_seed(0)
    model = graphopt.compile(entry.build(), plan)
    apart = []
    for rows in BATCHES:
        given = {name: value[:rows] for name, value in batch.items()}
        losses, gradients = [], []
        for each in (eager, model):
            loss = loss_of(each(**given))
            loss.backward()
            losses.append(float(loss))
            gradients.append(torch.cat([whole(p.grad).flatten() for p in each.parameters() if p.grad is not None]))
            each.zero_grad()
        difference = (gradients[0] - gradients[1]).norm() / gradients[0].norm()
        apart.append(max(float(difference), abs(losses[0] - losses[1]) / losses[0]))
    return apart


def _recompilations(rank: int, world: int, plan: str) -> tuple[list[float], int]:
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("graphopt").addHandler(handler)
    try:
        return _steps(rank, world, plan), sum("recompiling" in each for each in said)
    finally:
        logging.getLogger("graphopt").removeHandler(handler)


@pytest.mark.parametrize("plan", ["tp=2", "tp=2,tensor.sequence=true", "cp=2", "sp=2"])
def test_one_program_for_batches_of_several_sizes(ranks, plan: str) -> None:
    for apart, recompilations in ranks(2).run(_recompilations, f"{plan},dynamic=batch"):
        assert max(apart) <= 2e-6 and not recompilations
