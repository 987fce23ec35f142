"""Times against the roofline and the ring, by hand."""

import math

import pytest
import torch

from graphopt.cost.duration import collective_seconds, compute_seconds
from graphopt.cost.hardware import Hardware, Link
from graphopt.cost.operations import Work
from graphopt.ir.collectives import collective_of
from tests.ir.built import Hand, functional

SLOW = Hardware("slow", {"float32": 10.0, "bfloat16": 100.0}, 4.0, 1 << 20, 0.5, Link(8.0, 0.25))


def test_the_longer_of_computing_and_moving_bytes_and_the_launch() -> None:
    assert compute_seconds(Work(100, 8, 8, torch.float32), SLOW) == 10 + 0.5
    assert compute_seconds(Work(100, 8, 8, torch.bfloat16), SLOW) == 4 + 0.5
    assert compute_seconds(Work(0, 0, 4, torch.float32), SLOW) == 1 + 0.5
    assert compute_seconds(Work(0, 0, 0, torch.float32), SLOW) == 0


GATHER, REDUCTION = functional.all_gather_into_tensor.default, functional.reduce_scatter_tensor.default


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_rings(ranks: int) -> None:
    """A whole of 64 elements: each of N-1 rounds takes the latency and 1/N of its bytes; an all-reduce is both."""
    hand = Hand()
    shard, whole = hand.input(64 // ranks), hand.input(64)
    round_seconds = 0.25 + 64 * 4 / ranks / 8.0
    calls = [
        (hand.call(GATHER, shard, ranks, "dp"), 1),
        (hand.call(REDUCTION, whole, "sum", ranks, "dp"), 1),
        (hand.call(functional.all_reduce.default, whole, "sum", "dp"), 2),
        (hand.call(functional.all_to_all_single.default, whole, *[[64 // ranks] * ranks] * 2, "dp"), 1),
    ]
    for node, times in calls:
        collective = collective_of(node)
        assert collective is not None
        assert collective_seconds(collective, ranks, SLOW.link) == times * (ranks - 1) * round_seconds
        assert collective_seconds(collective, ranks, Link(math.inf, 0)) == 0
