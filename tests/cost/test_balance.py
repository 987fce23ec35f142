"""The cut of least time, against all cuts there are."""

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt.cost.balance import Lines, balanced
from graphopt.errors import GraphoptError

SLACK = 1.02


@st.composite
def rows(draw: st.DrawFn) -> Lines:
    """Up to nine calls; each reads a parameter or none."""
    count = draw(st.integers(2, 9))

    def sums(most: int) -> np.ndarray:
        return np.cumsum([0, *draw(st.lists(st.integers(0, most), min_size=count, max_size=count))])

    crossing = draw(st.lists(st.integers(0, 9), min_size=count + 1, max_size=count + 1))
    return Lines(sums(50) / 10, sums(9), sums(9), sums(1), np.array(crossing))


def _cuts(lines: Lines, live: Sequence[int], memory_bytes: int | None) -> list[tuple[float, int, list[int]]]:
    """By brute force: of every cut the time of its slowest stage, the bytes that cross, and its lines."""
    found = []
    for chosen in itertools.combinations(range(1, len(lines) - 1), len(live) - 1):
        ends = [0, *chosen, len(lines) - 1]
        stages = list(zip(ends, ends[1:], live, strict=False))
        held = [
            lines.state_bytes[b] - lines.state_bytes[a] + count * (lines.saved_bytes[b] - lines.saved_bytes[a])
            for a, b, count in stages
        ]
        reads = all(lines.parameters[b] > lines.parameters[a] for a, b, _ in stages)
        if reads and (memory_bytes is None or max(held) <= memory_bytes):
            slowest = max(lines.seconds[b] - lines.seconds[a] for a, b, _ in stages)
            found.append((slowest, int(sum(lines.crossing_bytes[list(chosen)])), list(chosen)))
    return found


@given(rows(), st.lists(st.integers(1, 4), min_size=1, max_size=4), st.none() | st.integers(0, 60))
def test_no_cut_is_better(lines: Lines, live: list[int], memory_bytes: int | None) -> None:
    every = _cuts(lines, live, memory_bytes)
    if not every:
        with pytest.raises(GraphoptError):
            balanced(lines, live, memory_bytes)
        return
    chosen = balanced(lines, live, memory_bytes)
    (mine,) = [cut for cut in every if cut[2] == chosen]
    fastest = min(slowest for slowest, _, _ in every)
    assert mine[0] <= fastest * SLACK
    near = [crossing for slowest, crossing, _ in every if slowest <= fastest * SLACK]
    assert mine[1] == min(near), "and of those as fast, the one over which the fewest bytes go"


def _uniform(calls: int, saved: int = 1) -> Lines:
    steps = np.arange(calls + 1)
    return Lines(steps.astype(float), 10 * steps, saved * steps, steps, np.ones(calls + 1, dtype=np.int64))


def test_early_stages_hold_more_microbatches_so_fewer_calls_fit() -> None:
    """Of eight calls, each 10 bytes and 1 a microbatch: 4 with 6 alive take 64, 2 take 32."""
    assert balanced(_uniform(8), [6, 1]) == [4]
    assert balanced(_uniform(8), [6, 1], 60) == [3]


def test_too_many_stages_name_the_most_there_may_be() -> None:
    with pytest.raises(GraphoptError, match=r"4 stages are more than .* choose 3"):
        balanced(_uniform(3), [1] * 4)


def test_too_little_memory_names_what_the_nearest_cut_takes() -> None:
    """Of eight calls in two stages the larger has four at least, with 11 bytes each."""
    with pytest.raises(GraphoptError, match=r"no cut into 2 stages leaves each at most 43.*the nearest takes 44"):
        balanced(_uniform(8), [1, 1], 43)
