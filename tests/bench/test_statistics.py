"""Medians, quartiles and paired ratios against closed forms; one small run of real rivals."""

import pytest

from bench.statistics import paired_ratios, spread
from bench.train import DATA_PARALLEL, measure


def test_quartiles_of_one_to_five() -> None:
    found = spread([5.0, 1.0, 4.0, 2.0, 3.0])
    assert (found.low, found.median, found.high, found.count) == (2.0, 3.0, 4.0, 5)


def test_ratios_do_not_see_a_drift_that_both_share() -> None:
    drift = [1.0, 2.0, 4.0]
    rounds = {"a": [[d, d, d] for d in drift], "b": [[1.5 * d] * 3 for d in drift]}
    found = paired_ratios(rounds, "a")["b"]
    assert (found.low, found.median, found.high) == (1.5, 1.5, 1.5)


@pytest.mark.long
def test_rivals_train_alike_and_a_missing_one_is_reported() -> None:
    found = measure(DATA_PARALLEL, ["ddp", "graphopt-zero3", "fsdp2"], world=2, rounds=1, steps=1)
    assert set(found["seconds"]) == {"ddp", "graphopt-zero3", "fsdp2"} and found["missing"] == {}
    assert max(found["largest_loss_difference"].values()) < 1e-4
