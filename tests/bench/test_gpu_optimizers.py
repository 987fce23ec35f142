"""What `bench.gpu_kernels` measures of optimizers computes the same as float64, and so do its rivals."""

import pytest
import torch

from bench.gpu_optimizers import SMALL, Case, cases, measured

BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8}


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_cases_are_near_float64_and_are_measured(case: Case) -> None:
    (run, *_) = case.runs(SMALL, "cpu")
    assert case.error("cpu") <= BOUNDS[run.parameter.dtype]
    called: list[object] = []

    def seconds(step, device: str) -> float:
        called.append(step())
        return 1.0

    found = measured(case, SMALL, "cpu", seconds)
    assert found["moved"] == case.moved * (64 * 64 + 64 + 3) and len(called) == len(found["seconds"])
