"""Runs operators of kernels as they are chosen to run, and compares what they give."""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch

from graphopt.triton_kernels import _triton
from graphopt.triton_kernels.choice import VARIABLE

WAYS = ["reference", "triton", "cuda"]
# Of the largest element; halves are rounded once, and what is summed of them is not rounded before.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


@contextlib.contextmanager
def mode(name: str) -> Iterator[None]:
    with mock.patch.dict(os.environ, {VARIABLE: name}):
        yield


@contextlib.contextmanager
def in_interpreter() -> Iterator[None]:
    """Operators run their Triton kernels, in the interpreter."""
    with mode("triton"), _triton.interpreted():
        yield


def computed_by(way: str) -> contextlib.AbstractContextManager[None]:
    """Operators run one variant, on the CPU."""
    return in_interpreter() if way == "triton" else mode(way)


def assert_near(found: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor], factor: float = 1.0) -> None:
    """Each tensor is near the wanted one, which may be of higher precision; what is not finite is alike."""
    for index, (one, other) in enumerate(zip(found, wanted, strict=True)):
        assert one.shape == other.shape, f"{index}: {list(one.shape)}, not {list(other.shape)}"
        bound = factor * TOLERANCES[one.dtype]
        one, other = one.detach().double(), other.detach().double()
        assert torch.equal(one.isnan(), other.isnan()), f"{index}: {one} is not undefined where {other} is"
        one, other = one.nan_to_num(0, 2e38, -2e38), other.nan_to_num(0, 2e38, -2e38)
        scale = float(other.abs().max()) if other.numel() else 0.0
        error = float((one - other).abs().max()) if other.numel() else 0.0
        assert error <= bound * scale, f"{index}: off by {error / scale if scale else error:.3g} of the largest"


def gradients(function: Callable[..., Any], tensors: Sequence[torch.Tensor], seeds: Sequence[torch.Tensor]) -> Any:
    """The gradients of all floating tensors, where results have the gradients `seeds`."""
    leaves = [tensor.detach().requires_grad_(tensor.is_floating_point()) for tensor in tensors]
    results = function(*leaves)
    results = results if isinstance(results, (list, tuple)) else [results]
    given = [(result, seed) for result, seed in zip(results, seeds, strict=False)]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    return torch.autograd.grad([r for r, _ in given], wanted, [s for _, s in given])
