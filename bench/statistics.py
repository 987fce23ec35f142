"""Medians with spread, and ratios that pair what ran next to each other."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """Median with the quartiles around it."""

    median: float
    low: float
    high: float
    count: int


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles (inclusive method) of at least one value."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0], 1)
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high, len(values))


def paired_ratios(rounds: Mapping[str, Sequence[Sequence[float]]], reference: str) -> dict[str, Spread]:
    """Ratios of medians to the reference's, round by round: a machine that drifts drifts for both."""
    theirs = [statistics.median(steps) for steps in rounds[reference]]
    return {
        name: spread([statistics.median(steps) / other for steps, other in zip(each, theirs, strict=True)])
        for name, each in rounds.items()
    }
