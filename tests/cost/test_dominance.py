"""What is left out is never the largest."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from graphopt.cost.dominance import undominated

ROWS = st.lists(st.tuples(*[st.integers(0, 6)] * 3), min_size=1, max_size=12)


@given(rows=ROWS, points=st.lists(st.tuples(*[st.integers(0, 1000)] * 3), min_size=1, max_size=20))
def test_the_largest_sum_is_among_those_that_are_kept(
    rows: list[tuple[int, ...]], points: list[tuple[int, ...]]
) -> None:
    sums = np.array(rows, np.float64)
    kept = undominated(sums)
    for point in points:
        assert (sums[kept] @ point).max() == (sums @ point).max()


def test_what_lies_between_two_others_is_left_out() -> None:
    layers = np.array([[layer * 3, (31 - layer) * 7, 5] for layer in range(32)], np.float64)
    assert sorted(undominated(layers)) == [0, 31]


def test_what_bulges_out_between_two_others_is_kept() -> None:
    assert sorted(undominated(np.array([[0.0, 10.0], [6.0, 6.0], [10.0, 0.0], [1.0, 8.0]]))) == [0, 1, 2]
