"""A split step computes what the model does, for every architecture; and splits as is known to be best."""

import pytest
import torch

from tests.support.split import split_program
from tests.support.zoo import WITH_DROPOUT, ZOO, Entry, loss_of

BOUND = 2e-6


def _distance(entry: Entry, ranks: int, options: str = "") -> float:
    """The relative difference from eager of the loss, or that of all gradients taken as one vector."""
    torch.manual_seed(0)
    model, batch = entry.build().train(), entry.batch()
    torch.manual_seed(7)
    loss, gradients = split_program(model, batch, ranks, options).run()
    wanted = loss_of(model(**batch))
    wanted.backward()
    apart = size = 0.0
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            apart += float((gradients[name] - parameter.grad).double().square().sum())
            size += float(parameter.grad.double().square().sum())
    return max(abs(float(loss - wanted)) / abs(float(wanted)), (apart / size) ** 0.5)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", ZOO)
def test_a_split_step_gives_the_loss_and_gradients_of_eager(name: str, ranks: int) -> None:
    assert _distance(ZOO[name], ranks) <= BOUND
