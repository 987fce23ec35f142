"""The least sum of tables, beside trying everything."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt.cost.assignment import Table, least_cost
from graphopt.errors import GraphoptError


@st.composite
def _problems(draw: st.DrawFn) -> tuple[dict[str, int], list[Table[str]]]:
    names = [f"x{i}" for i in range(draw(st.integers(1, 6)))]
    sizes = {name: draw(st.integers(1, 3)) for name in names}
    costs = st.one_of(st.integers(0, 20).map(float), st.just(math.inf))
    tables = []
    for _ in range(draw(st.integers(0, 8))):
        chosen = tuple(draw(st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True)))
        shape = [sizes[name] for name in chosen]
        entries = draw(st.lists(costs, min_size=math.prod(shape), max_size=math.prod(shape)))
        tables.append(Table(chosen, np.array(entries).reshape(shape)))
    return sizes, tables


def _cost(tables: list[Table[str]], values: dict[str, int]) -> float:
    return sum(float(table.costs[tuple(values[name] for name in table.variables)]) for table in tables)


@given(_problems())
def test_nothing_costs_less(problem: tuple[dict[str, int], list[Table[str]]]) -> None:
    sizes, tables = problem
    every = [dict(zip(sizes, choice, strict=True)) for choice in itertools.product(*map(range, sizes.values()))]
    least = min(_cost(tables, values) for values in every)
    if math.isinf(least):
        with pytest.raises(GraphoptError, match="no assignment"):
            least_cost(sizes, tables)
        return
    found = least_cost(sizes, tables)
    assert found.cost == least
    assert _cost(tables, dict(found.values)) == least
    assert found == least_cost(sizes, tables)


def test_a_long_chain_is_no_wider_than_a_short_one() -> None:
    count, size = 2_000, 6
    sizes = dict.fromkeys(range(count), size)
    costs = np.abs(np.subtract.outer(np.arange(size), (np.arange(size) + 1) % size)).astype(float)
    found = least_cost(sizes, [Table((i, i + 1), costs) for i in range(count - 1)])
    assert found.cost == sum(costs[found.values[i], found.values[i + 1]] for i in range(count - 1))


def test_what_depends_on_everything_is_refused() -> None:
    sizes = dict.fromkeys(range(14), 6)
    tables = [Table(pair, np.zeros((6, 6))) for pair in itertools.combinations(sizes, 2)]
    with pytest.raises(GraphoptError, match="too widely"):
        least_cost(sizes, tables)
