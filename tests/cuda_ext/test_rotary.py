"""Rotary embedding in native code, against rotations of complex numbers in float64."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphopt.cuda_ext.reference import rotary as reference
from graphopt.cuda_ext.rotary import rotary
from tests.cuda_ext.nearness import DTYPES, assert_near, doubled, random


def _turned(x: torch.Tensor, angles: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """x [batch, heads, positions, width] as complex numbers, times those of unit length at `angles`."""
    pairs, x = angles.shape[-1], x.double()
    parts = x[..., : 2 * pairs].unflatten(-1, (pairs, 2) if interleaved else (2, pairs))
    numbers = torch.complex(*parts.unbind(-1 if interleaved else -2))
    turned = torch.view_as_real(numbers * torch.polar(torch.ones_like(angles), angles)[:, None])
    turned = turned if interleaved else turned.transpose(-1, -2)
    return torch.cat([turned.flatten(-2), x[..., 2 * pairs :]], -1)


def _check(
    dtype: torch.dtype, sizes: tuple[int, ...], interleaved: bool, by_position: bool, batched: bool, seed: int = 0
) -> None:
    batch, heads, kv_heads, positions, pairs, rest = sizes
    angles = random(torch.float64, batch if batched else 1, positions, pairs, seed=seed)
    cos, sin = angles.cos().float(), angles.sin().float()
    tensors = []
    for each in (heads, kv_heads):
        shape = (batch, positions, each) if by_position else (batch, each, positions)
        x = random(dtype, *shape, 2 * pairs + rest, seed=seed + each)
        tensors.append(x.transpose(1, 2) if by_position else x)
    found = rotary(tensors[0], tensors[1], cos, sin, interleaved)
    back = rotary(*found, cos, sin, interleaved, inverse=True)
    for x, turned, returned in zip(tensors, found, back, strict=True):
        assert turned.dtype == dtype and turned.shape == x.shape
        assert turned.numel() < 2 or turned.stride() == torch.empty_like(x).stride()
        assert_near(turned, _turned(x, angles, interleaved), 5e-7)
        assert_near(returned, x.double(), 1e-6 if dtype == torch.float32 else 0.02)


@given(
    sizes=st.tuples(*(st.integers(0, 3) for _ in range(3)), st.integers(0, 9), st.integers(0, 40), st.integers(0, 5)),
    dtype=st.sampled_from(DTYPES),
    interleaved=st.booleans(),
    by_position=st.booleans(),
    batched=st.booleans(),
    seed=st.integers(0, 99),
)
def test_pairs_are_turned(sizes: tuple[int, ...], dtype: torch.dtype, seed: int, **how: bool) -> None:
    _check(dtype, sizes, seed=seed, **how)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set(instructions: str, dtype: torch.dtype, interleaved: bool) -> None:
    for by_position in (False, True):
        _check(dtype, (2, 4, 2, 17, 64, 0), interleaved, by_position, False)


@pytest.mark.parametrize("by_position", [False, True])
def test_threads_share_positions(two_threads: None, by_position: bool) -> None:
    _check(torch.float32, (3, 8, 2, 37, 64, 16), False, by_position, True)


def test_tables_may_be_of_the_dtype_of_q_and_half_of_a_wider_one() -> None:
    q, k = random(torch.bfloat16, 1, 2, 5, 16), random(torch.bfloat16, 1, 1, 5, 16)
    cos, sin = random(torch.bfloat16, 2, 1, 5, 16)
    found = rotary(q, k, cos[..., :8], sin[..., :8])
    for turned, exact in zip(found, reference(*doubled(q, k, cos[..., :8], sin[..., :8])), strict=True):
        assert_near(turned, exact)


@pytest.mark.parametrize("interleaved", [False, True])
def test_backward_is_the_inverse(interleaved: bool) -> None:
    q, k = random(torch.float64, 2, 3, 5, 20).requires_grad_(), random(torch.float64, 2, 1, 5, 20).requires_grad_()
    angles = random(torch.float64, 1, 5, 8)
    tables = angles.cos(), angles.sin()
    turned = reference(q, k, *tables, interleaved)
    torch.testing.assert_close(turned[0], _turned(q, angles, interleaved))
    gradients = torch.randn_like(q), torch.randn_like(k)
    expected = torch.autograd.grad(turned, (q, k), gradients)
    torch.testing.assert_close(reference(*gradients, *tables, interleaved, inverse=True), expected)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("q", torch.zeros(2, 3, 8), r"q has the shape \[2, 3, 8\]"),
        ("k", torch.zeros(2, 1, 5, 9), r"k has the shape \[2, 1, 5, 9\], not \[2, any, 5, 8\]"),
        ("k", torch.zeros(2, 1, 5, 8).bfloat16(), "k is torch.bfloat16, not torch.float32"),
        ("k", torch.zeros(2, 1, 8, 5).transpose(2, 3), "k has the stride 5 in its last dimension, not 1"),
        ("cos", torch.zeros(1, 4, 4), r"cos has the shape \[1, 4, 4\], not \[any, 5, any\]"),
        ("sin", torch.zeros(1, 5, 3), r"sin has the shape \[1, 5, 3\], not \[1, 5, 4\]"),
    ],
)
def test_an_argument_that_does_not_fit_is_named(name: str, tensor: torch.Tensor, message: str) -> None:
    tables = torch.zeros(1, 5, 4)
    arguments: dict[str, Any] = {
        "q": torch.zeros(2, 3, 5, 8),
        "k": torch.zeros(2, 1, 5, 8),
        "cos": tables,
        "sin": tables,
    }
    with pytest.raises(ValueError, match=message):
        rotary(**{**arguments, name: tensor})


def test_tables_of_another_batch_or_width_are_named() -> None:
    q = torch.zeros(2, 1, 5, 8)
    with pytest.raises(ValueError, match="cos is for a batch of 3, q has one of 2"):
        rotary(q, q, torch.zeros(3, 5, 4), torch.zeros(3, 5, 4))
    with pytest.raises(ValueError, match="cos has 5 pairs, q has no more than 4 in its width of 8"):
        rotary(q, q, torch.zeros(1, 5, 5), torch.zeros(1, 5, 5))
