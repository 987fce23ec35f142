"""A split step computes what the model does, for every architecture; and splits as is known to be best."""

import pytest
import torch

from tests.support.split import eager_step, split_program
from tests.support.zoo import WITH_DROPOUT, ZOO, Entry

BOUND = 2e-6


def _distance(entry: Entry, ranks: int, options: str = "") -> float:
    torch.manual_seed(0)
    model, batch = entry.build().train(), entry.batch()
    return split_program(model, batch, ranks, options).run().distance(eager_step(model, batch))


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", ZOO)
def test_a_split_step_gives_the_loss_and_gradients_of_eager(name: str, ranks: int) -> None:
    assert _distance(ZOO[name], ranks) <= BOUND
