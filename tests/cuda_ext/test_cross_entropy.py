"""Cross-entropy in native code, against torch's own in float64; and the reference against autograd."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from graphopt._torch import version_of
from graphopt.cuda_ext import reference
from graphopt.cuda_ext.cross_entropy import cross_entropy, cross_entropy_backward, cross_entropy_with_gradient
from tests.cuda_ext.nearness import DTYPES, assert_near, random

COLUMNS = st.one_of(st.integers(1, 200), st.sampled_from([2047, 2048, 2049, 10_001]))
IGNORED = -1


def _made(dtype: torch.dtype, rows: int, columns: int, seed: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(columns, (rows,), generator=generator)
    return random(dtype, rows, columns, seed=seed, scale=scale), targets.where(torch.arange(rows) % 4 != 2, IGNORED)


def _by_torch(logits: torch.Tensor, targets: torch.Tensor, smoothing: float, z_loss: float) -> torch.Tensor:
    losses = functional.cross_entropy(
        logits, targets, ignore_index=IGNORED, label_smoothing=smoothing, reduction="none"
    )
    return losses + z_loss * logits.logsumexp(-1).square().where(targets != IGNORED, 0)


def _check(
    dtype: torch.dtype,
    rows: int,
    columns: int,
    seed: int = 0,
    scale: float = 3,
    smoothing: float = 0,
    z_loss: float = 0,
) -> None:
    logits, targets = _made(dtype, rows, columns, seed, scale)
    options: dict[str, Any] = {"ignore_index": IGNORED, "label_smoothing": smoothing, "z_loss": z_loss}
    wide = logits.double().requires_grad_()
    expected = _by_torch(wide, targets, smoothing, z_loss)
    scales = random(torch.float32, rows, seed=seed)
    (gradient,) = torch.autograd.grad(expected, wide, scales.double())
    losses, log_normalizers = cross_entropy(logits, targets, **options)
    magnitude = logits.double().abs().amax(-1) if rows else logits.new_zeros(0).double()
    assert ((losses.double() - expected.detach()).abs() <= 3e-7 * (5 + magnitude + expected.detach().abs())).all()
    assert losses.dtype == log_normalizers.dtype == torch.float32
    found = cross_entropy_backward(scales, logits, targets, log_normalizers, **options)
    # What rounds the normalizer changes every probability, and at the target that is taken from 1.
    allowed = scales.abs()[:, None].double() * (2e-7 * (2 + magnitude) * (1 + 2 * z_loss * (10 + magnitude)))[:, None]
    if dtype == torch.bfloat16:
        allowed = allowed + gradient.abs() * 2.0**-8
    assert found.dtype == dtype and ((found.double() - gradient).abs() <= allowed).all()
    both = cross_entropy_with_gradient(logits.clone(), targets, scales, **options)
    for ours, alone in zip(both, (losses, log_normalizers, found), strict=True):
        assert torch.equal(ours, alone)


@given(
    rows=st.integers(0, 5),
    columns=COLUMNS,
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
    scale=st.sampled_from([0.01, 3.0, 30.0]),
    smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    z_loss=st.sampled_from([0.0, 1e-4, 0.1]),
)
def test_cross_entropy_is_near_float64(
    rows: int, columns: int, dtype: torch.dtype, seed: int, scale: float, smoothing: float, z_loss: float
) -> None:
    _check(dtype, rows, columns, seed, scale, smoothing, z_loss)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set_is_near_float64(instructions: str, dtype: torch.dtype) -> None:
    _check(dtype, 3, 50_257, smoothing=0.1, z_loss=1e-4)


def test_threads_share_tokens(two_threads: None) -> None:
    _check(torch.float32, 33, 2049)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_may_be_written_over_the_logits(dtype: torch.dtype) -> None:
    logits, targets = _made(dtype, 6, 300, 0, 3)
    losses, log_normalizers, gradient = cross_entropy_with_gradient(logits.clone(), targets, ignore_index=IGNORED)
    held = logits.clone()
    found = cross_entropy_with_gradient(held, targets, ignore_index=IGNORED, in_place=True)
    assert found[2] is held and torch.equal(held, gradient) and torch.equal(found[0], losses)
    held, ones = logits.clone(), torch.ones(6)
    before = version_of(held)
    found_alone = cross_entropy_backward(ones, held, targets, log_normalizers, ignore_index=IGNORED, in_place=True)
    assert found_alone is held and torch.equal(held, gradient) and version_of(held) > before


def test_masked_logits_have_no_probability() -> None:
    logits = random(torch.float32, 2, 5000)
    logits[:, 100:4000] = -math.inf
    losses, _, gradient = cross_entropy_with_gradient(logits.clone(), torch.tensor([0, 4500]))
    assert (gradient[:, 100:4000] == 0).all() and gradient.isfinite().all()
    assert_near(losses, functional.cross_entropy(logits.double(), torch.tensor([0, 4500]), reduction="none"))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_row_that_has_no_loss_says_so_alone(value: float) -> None:
    logits = random(torch.float32, 3, 100)
    logits[1, 50] = value
    losses, _, gradient = cross_entropy_with_gradient(logits, torch.tensor([0, 1, 2]))
    assert losses.isnan().tolist() == [False, True, False]
    assert gradient[1].isnan().any() and gradient[[0, 2]].isfinite().all()


def test_large_logits_do_not_overflow() -> None:
    logits = torch.tensor([[3e38, -3e38, 0.0], [-3e38, -3e38, -3e38]])
    losses = cross_entropy(logits, torch.tensor([0, 1]))[0]
    assert losses[0] == 0 and losses.isfinite().all()


def test_the_reference_is_what_autograd_finds() -> None:
    logits, targets = _made(torch.float64, 7, 33, 0, 3)
    logits, dlosses = logits.requires_grad_(), random(torch.float64, 7)
    options: dict[str, Any] = {"ignore_index": IGNORED, "label_smoothing": 0.2, "z_loss": 0.1}
    losses, log_normalizers = reference.cross_entropy(logits, targets, **options)
    torch.testing.assert_close(losses, _by_torch(logits, targets, 0.2, 0.1))
    (expected,) = torch.autograd.grad(losses, logits, dlosses)
    found = reference.cross_entropy_backward(dlosses, logits, targets, log_normalizers, **options)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("logits", torch.zeros(3, 8).half(), "logits is torch.float16"),
        ("logits", torch.zeros(8, 3).T, "logits is not contiguous"),
        ("targets", torch.zeros(3, dtype=torch.int32), "targets is torch.int32, not torch.int64"),
        ("targets", torch.zeros(4, dtype=torch.int64), r"targets has the shape \[4\], not \[3\]"),
        ("targets", torch.tensor([0, -100, 8]), r"targets\[2\] is 8, neither one of 8 columns nor ignore_index -100"),
        ("targets", torch.tensor([0, -1, -100]), r"targets\[1\] is -1, neither one of 8 columns"),
        ("scales", torch.zeros(3).double(), "scales is torch.float64, not torch.float32"),
    ],
)
def test_an_argument_that_does_not_fit_is_named(name: str, tensor: torch.Tensor, message: str) -> None:
    arguments: dict[str, Any] = {"logits": torch.zeros(3, 8), "targets": torch.zeros(3, dtype=torch.int64)}
    with pytest.raises(ValueError, match=message):
        cross_entropy_with_gradient(**{**arguments, name: tensor})
