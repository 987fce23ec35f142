"""Models split by hand and by graphopt are trained alike, and a layer sends what Megatron's formula says."""

from collections.abc import Callable

import pytest
import torch

from bench.split import _make, _tokens, choosing, layer_bytes
from bench.workloads import llama
from tests.support.ranks import Ranks


def _losses(rank: int, world: int, name: str) -> list[float]:
    step = _make(name, llama(1, 64, 8192))
    return [step(_tokens(index, rank)) for index in range(2)]


def test_rivals_compute_alike(ranks: Callable[[int], Ranks]) -> None:
    theirs, ours = (ranks(2).run(_losses, name) for name in ("torch-tp", "graphopt-tp"))
    assert theirs[0] == theirs[1] and theirs[0][0] != theirs[0][1]
    assert ours[0] == ours[1] == pytest.approx(theirs[0], rel=1e-5)


def test_the_choice_is_timed_part_by_part() -> None:
    found = choosing(1, (2, 4), rounds=1)
    assert found.keys() == {2, 4}
    for parts in found.values():
        assert sum(parts[name]["median"] for name in ("classes", "space", "choice")) == pytest.approx(
            parts["total"]["median"]
        )


@pytest.mark.long
def test_a_layer_sends_what_four_all_reduces_do() -> None:
    found = layer_bytes(ranks=8)
    statistics = 4 * 2 * (7 / 8) * 4096 * torch.float32.itemsize  # of two norms, forward and backward
    for kind in ("all-gather", "reduce-scatter"):
        assert found["weights"][kind] == found["megatron"] / 2
        assert found["megatron"] / 2 <= found["sequence"][kind] < found["megatron"] / 2 * 1.001
    assert found["weights"]["all-reduce"] == statistics
