"""The choice of splits, beside the integer program of the same tables."""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import highspy
import numpy as np
import pytest
import torch
from torch import nn

from graphopt.cost import splitting
from graphopt.cost.assignment import Assignment, Table, least_cost
from tests.support.split import split_program
from tests.support.split_models import ATTENTION, MLPS, Blocks, Convolutions, images, tokens
from tests.support.zoo import ZOO

Tables = Sequence[Table[Hashable]]
_MICROSECONDS = 1e6


class _IntegerProgram:
    """A column is one for each value that a variable may have, and for each pair of values that a table may have."""

    def __init__(self, sizes: Mapping[Hashable, int], tables: Tables) -> None:
        starts = np.cumsum([0, *sizes.values()])
        self._at = dict(zip(sizes, starts.tolist(), strict=False))
        self._costs: list[float] = [0.0] * int(starts[-1])
        self._terms: list[tuple[int, float]] = []
        self._starts = [0]
        self._totals: list[float] = []
        self.binary = len(self._costs)
        for variable, size in sizes.items():
            self._row({self._at[variable] + value: 1.0 for value in range(size)}, 1.0)
        pairs: dict[tuple[Hashable, ...], Any] = {}
        for table in tables:
            known = pairs.setdefault(table.variables, np.zeros(table.costs.shape))
            pairs[table.variables] = known + table.costs
        for variables, costs in pairs.items():
            self._add_table(variables, costs * _MICROSECONDS)

    def _add_table(self, variables: tuple[Hashable, ...], costs: Any) -> None:
        first = len(self._costs)
        allowed = np.argwhere(np.isfinite(costs))
        self._costs += [float(costs[tuple(entry)]) for entry in allowed]
        for dim, variable in enumerate(variables):
            for value in range(costs.shape[dim]):
                terms = {first + int(index): 1.0 for index in np.flatnonzero(allowed[:, dim] == value)}
                self._row({self._at[variable] + value: -1.0, **terms}, 0.0)

    def _row(self, terms: Mapping[int, float], total: float) -> None:
        self._terms += terms.items()
        self._starts.append(len(self._terms))
        self._totals.append(total)

    def solved(self) -> float:
        """The least cost, in seconds."""
        columns, rows = len(self._costs), len(self._totals)
        at_column, factors = zip(*self._terms, strict=True)
        program = highspy.HighsLp()
        program.num_col_, program.num_row_ = columns, rows
        program.col_cost_ = np.array(self._costs)
        program.col_lower_, program.col_upper_ = np.zeros(columns), np.ones(columns)
        program.row_lower_ = program.row_upper_ = np.array(self._totals)
        program.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
        program.a_matrix_.start_, program.a_matrix_.index_ = np.array(self._starts), np.array(at_column)
        program.a_matrix_.value_ = np.array(factors)
        kinds = [highspy.HighsVarType.kInteger] * self.binary
        program.integrality_ = kinds + [highspy.HighsVarType.kContinuous] * (columns - self.binary)
        solver = highspy.Highs()
        solver.silent()
        solver.setOptionValue("mip_rel_gap", 0.0)
        solver.passModel(program)
        solver.run()
        assert solver.getModelStatus() == highspy.HighsModelStatus.kOptimal
        return float(solver.getInfo().objective_function_value) / _MICROSECONDS


CASES: Mapping[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Any]], int, str]] = {
    "grouped attention": (lambda: Blocks(ATTENTION["two heads of keys, grouped"]()), tokens, 2, ""),
    "fused projections": (lambda: Blocks(MLPS["fused"](), tied=True), tokens, 4, ",sequence=true"),
    "convolutions": (lambda: Convolutions(8, 8), images, 2, ""),
    "heads": (lambda: Blocks(ATTENTION["fused"]()), tokens, 2, ",along=heads"),
    "llama": (ZOO["llama"].build, ZOO["llama"].batch, 2, ""),
}


@pytest.mark.parametrize("name", CASES)
def test_no_choice_costs_less(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch, ranks, options = CASES[name]
    made: list[tuple[Mapping[Hashable, int], Tables, Assignment[Hashable]]] = []

    def noted(sizes: Mapping[Hashable, int], tables: Tables) -> Assignment[Hashable]:
        made.append((sizes, tables, least_cost(sizes, tables)))
        return made[-1][2]

    monkeypatch.setattr(splitting, "least_cost", noted)
    torch.manual_seed(0)
    split_program(model(), batch(), ranks, options, "h100-sxm")
    ((sizes, tables, found),) = made
    assert math.isclose(found.cost, _IntegerProgram(sizes, tables).solved(), rel_tol=1e-6)
