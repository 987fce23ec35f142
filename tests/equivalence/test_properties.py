"""Any small module under any plan, on any number of ranks, does what it does uncompiled."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from torch.nn import functional as F

from tests.equivalence.campaign import campaign, on_ranks
from tests.support.drawn.example import Example
from tests.support.drawn.judge import Disagreement
from tests.support.drawn.script import judge_each_pass, judge_some_steps
from tests.support.drawn.strategies import examples

ROOT = Path(__file__).parents[2]


@given(example=examples())
def test_no_pass_changes_what_a_module_does(example: Example) -> None:
    judge_each_pass(example)


@given(example=examples((1,)))
def test_training_alone(example: Example) -> None:
    judge_some_steps(example)


@pytest.mark.parametrize("world", [2, 3])
def test_training_on_ranks(ranks, world: int) -> None:
    @settings(max_examples=settings.default.max_examples // 4)
    @given(example=examples((world,), random=False, whole_batch=False))
    def each(example: Example) -> None:
        judge_some_steps(example, on_ranks(ranks))

    each()


def test_a_failure_shrinks_to_a_script_that_fails_by_itself(tmp_path: Path) -> None:
    registry = "tests.support.drawn.planted:REGISTRY"

    @settings(
        max_examples=60, database=None, phases=[Phase.generate, Phase.shrink], suppress_health_check=list(HealthCheck)
    )
    @given(example=examples((1,), random=False, most_layers=2, kinds=["sort", "stack", "linear"]))
    def each(example: Example) -> None:
        judge_each_pass(example, registry)

    with pytest.raises(Disagreement) as caught:
        each()
    source = next(note for note in caught.value.__notes__ if "class Model" in note)
    assert source.count("tanh") == 1, "of all layers one with a tanh is left"
    file = tmp_path / "failure.py"
    file.write_text(source)
    ran = subprocess.run(
        [sys.executable, str(file)], capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}, check=False
    )
    assert ran.returncode == 1
    said = str(caught.value).replace("<drawn>", file.name)
    assert ran.stderr.splitlines()[-1] == f"Disagreement: {said}"


def test_masks_are_the_same_in_float64() -> None:
    """What makes float64 a measure of modules with dropout."""
    masks = []
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)
        masks.append(F.dropout(torch.ones(1000, dtype=dtype), 0.25) != 0)
    assert torch.equal(*masks)


@pytest.mark.long
def test_many_examples(tmp_path: Path) -> None:
    assert campaign(examples=400, jobs=2, first_seed=0, store=tmp_path / "properties.json")
