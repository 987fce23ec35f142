"""The optimizers that are compared do the same work."""

import pytest
import torch

from bench import optimizer
from bench.optimizer import compare

SHAPES = [torch.Size([64, 32]), torch.Size([33])]


def test_a_small_comparison_has_every_rival() -> None:
    found = compare(layers=1, rounds=1, steps=1, threads=1)
    assert found["elements"] > 4096 * 512 and {"graphopt", "torch fused"} < set(found["float32"]["seconds"])
    assert set(found["bfloat16"]["ratios"]["torch fused, casts"]) == set(found["bfloat16"]["seconds"])


@pytest.mark.parametrize("make", [optimizer._float32, optimizer._bfloat16])
def test_rivals_compute_alike(make, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[list[torch.nn.Parameter]] = []
    parameters = optimizer._parameters

    def recorded(*args):
        held.append(parameters(*args))
        return held[-1]

    monkeypatch.setattr(optimizer, "_parameters", recorded)
    for step in make(SHAPES).values():
        step()
    assert len(held) == 3 and not torch.equal(held[0][0], parameters(SHAPES, held[0][0].dtype)[0])
    for others in held[1:]:
        torch.testing.assert_close(others, held[0])
