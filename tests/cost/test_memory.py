"""Predicted bytes against hand counts and against what a run allocates."""

import pytest

from graphopt.cost.communication import communication
from graphopt.cost.memory import memory
from tests.support.programs import lowered

MATRIX = 16 * 16 * 4


@pytest.mark.parametrize(
    ("stage", "parameters", "gathered"),
    [(0, 3 * MATRIX, 0), (1, 0, 3 * MATRIX), (2, 0, 3 * MATRIX), (3, 3 * MATRIX // 2, 2 * MATRIX)],
)
def test_model_state_by_category(stage: int, parameters: int, gathered: int) -> None:
    """In stages 1 and 2 the shard is a part of the gathered whole; in stage 3 two buckets are there at a time."""
    _, program = lowered(f"zero={stage},zero.whole_below=0,zero.bucket_bytes={MATRIX}")
    found = memory(program).by_category
    assert found.get("parameters", 0) == parameters
    assert found.get("gathered", 0) == gathered
    assert found["gradients"] == 3 * MATRIX // (1 if stage == 0 else 2) + 4 * 16 * 4, "and that of the input"


def test_the_peak_is_the_largest_of_the_timeline() -> None:
    _, program = lowered("zero=3,zero.whole_below=0")
    found = memory(program)
    assert found.peak_bytes >= max(found.timeline) and len(found.timeline) == len(program.compute_nodes())


@pytest.mark.parametrize(("world", "stage", "times"), [(2, 0, 2), (4, 1, 2), (4, 2, 2), (8, 3, 3)])
def test_bytes_are_the_closed_form(world: int, stage: int, times: int) -> None:
    _, program = lowered(f"zero={stage},zero.whole_below=0", world)
    found = communication(program, {"dp": world})
    assert found.total_bytes == pytest.approx(times * 3 * MATRIX * (world - 1) / world)
