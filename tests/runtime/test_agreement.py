"""Ranks that differ stop with an error on every rank: nothing hangs."""

import torch
from torch import nn

import graphopt
from graphopt import GraphoptError, Plan
from tests.support.ranks import Ranks


def _error(make: object, *args: object) -> str:
    try:
        make(*args)  # type: ignore[operator]
    except GraphoptError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def _plans(rank: int, world: int) -> str:
    return _error(graphopt.compile, nn.Linear(4, 4), Plan(zero=rank + 1))


def _models(rank: int, world: int) -> str:
    return _error(graphopt.compile, nn.Linear(4, 4 + rank), Plan(zero=3))


class _Unlike(nn.Module):
    def __init__(self, rank: int) -> None:
        super().__init__()
        self.a, self.b, self.rank = nn.Linear(64, 64), nn.Linear(64, 64), rank

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x)) if self.rank else self.a(x)


def _programs(rank: int, world: int) -> str:
    return _error(graphopt.compile(_Unlike(rank), Plan(zero=3)), torch.randn(2, 64))


class _FailsOnOne(_Unlike):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x) if self.rank or x.sum() > 0 else x


def _capture(rank: int, world: int) -> str:
    return _error(graphopt.compile(_FailsOnOne(rank), Plan(zero=3)), torch.randn(2, 64))


def test_plans_that_differ(ranks) -> None:
    answers = _run(ranks(2), _plans)
    assert all(a.startswith("RankMismatchError") and "plan" in a and "rank 1" in a for a in answers)


def test_models_that_differ(ranks) -> None:
    answers = _run(ranks(2), _models)
    assert all(a.startswith("RankMismatchError") and "rank 1" in a for a in answers)


def test_programs_that_differ(ranks) -> None:
    answers = _run(ranks(2), _programs)
    wanted = "RankMismatchError: the ranks differ in their program: rank 0 has all-gather"
    assert all(a.startswith(wanted) and "b_weight" in a for a in answers), answers


def test_a_capture_that_fails_on_one_rank(ranks) -> None:
    first, second = _run(ranks(2), _capture)
    assert first.startswith("CaptureError") and second.startswith("RankMismatchError: rank 0 failed: CaptureError")


def _run(pool: Ranks, function: object) -> list[str]:
    return pool.run(function, timeout=60)  # type: ignore[arg-type]
