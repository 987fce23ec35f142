"""The predicted peak of a pipelined step against what each rank reaches."""

import pytest

from bench.pipeline_memory import peak_on_this_rank


def _on_a_rank(rank: int, world: int, plan: str) -> tuple[int, int]:
    return peak_on_this_rank(plan)


@pytest.mark.parametrize(
    "plan",
    [
        "pp=2,pipeline=gpipe",
        "pp=2,pipeline=1f1b",
        "pp=2,pipeline=zbv",
        "pp=2,pipeline=1f1b,remat=full",
    ],
)
def test_the_peak_is_what_each_of_two_ranks_reaches(ranks, plan: str) -> None:
    for predicted, measured in ranks(2).run(_on_a_rank, plan):
        assert predicted == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize(("schedule", "stage"), [("1f1b", 1), ("1f1b", 2), ("zbv", 3)])
def test_the_peak_with_shards_on_four_ranks(ranks, schedule: str, stage: int) -> None:
    plan = f"pp=2,dp=2,zero={stage},zero.whole_below=0,pipeline={schedule}"
    for predicted, measured in ranks(4).run(_on_a_rank, plan):
        assert predicted == pytest.approx(measured, rel=0.01)
