"""Sweeps are judged by their peaks, pictures show them, and the bound of the gap is below the optimum."""

from xml.etree import ElementTree

import pytest
import torch

from bench.optimum import optimum
from bench.remat import planner
from bench.remat_gap import Bound
from bench.remat_picture import picture
from bench.remat_sweep import Point, seconds_of, violations
from graphopt.cost.memory import memory
from tests.support.programs import Mlp, lowered

_POINTS = [Point(1.0, 100, 90, 5), Point(0.5, 80, 85, 5), Point(0.0, 60, 120, 7)]


def test_rises_and_peaks_above_the_budget_are_counted() -> None:
    assert violations(_POINTS) == {"rises": 1, "largest_rise_bytes": 35, "above_budget": 2}
    assert violations(_POINTS[:1]) == {"rises": 0, "largest_rise_bytes": 0, "above_budget": 0}


def test_the_picture_has_a_curve_for_each() -> None:
    points = [vars(point) for point in _POINTS]
    svg = ElementTree.fromstring(picture({"graphopt": points, "torch": points}))
    lines = svg.findall("{http://www.w3.org/2000/svg}polyline")
    assert [len(str(line.get("points")).split()) for line in lines] == [3, 3, 3]
    assert lines[1].get("points") == lines[2].get("points") != lines[0].get("points")


@pytest.mark.long
def test_the_planner_is_timed_at_each_depth() -> None:
    found = planner((8,))
    assert found.keys() == {8} and found[8] > 0


@pytest.mark.parametrize("share", [0.2, 0.4])
def test_the_bound_is_no_more_than_the_optimum(share: float) -> None:
    x = torch.randn(64, 16)
    _, program = lowered("passes=canonicalize,differentiate", 1, Mlp(), x=x)
    unlimited = memory(program, {"dp": 1})
    limit = int(unlimited.peak_bytes - share * unlimited.by_category["activations"])
    best = optimum(program, seconds_of, limit)
    bound = Bound(program, unlimited.lives).least_seconds(limit)
    assert best is not None and best.is_proven and best.seconds is not None
    assert 0 < bound <= best.seconds + 1e-12
