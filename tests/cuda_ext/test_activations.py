"""Activations in native code, against float64; and the reference against autograd."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphopt.cuda_ext import activations, reference
from graphopt.cuda_ext.activations import ACTIVATIONS
from tests.cuda_ext.nearness import DTYPES, assert_near, doubled, random

WIDTHS = st.one_of(st.integers(0, 200), st.sampled_from([768, 1023, 14_336]))


def _check(dtype: torch.dtype, rows: int, width: int, activation: str, seed: int = 0) -> None:
    gate, up, dy = random(dtype, 3, rows, width, seed=seed, scale=3)
    bias = random(dtype, width, seed=seed + 1)
    assert_near(activations.gated(gate, up, activation), reference.gated(*doubled(gate, up), activation=activation))
    found = activations.gated_backward(dy, gate, up, activation)
    for tensor, exact in zip(
        found, reference.gated_backward(*doubled(dy, gate, up), activation=activation), strict=True
    ):
        assert tensor.dtype == dtype
        assert_near(tensor, exact)
    # The sum is rounded before the activation is taken of it: half a unit of 12 there.
    y = activations.bias_activation(gate, bias, activation)
    assert_near(y, reference.bias_activation(*doubled(gate, bias), activation=activation), 2e-6)
    dx, dbias = activations.bias_activation_backward(dy, gate, bias, activation)
    exact, of_bias = reference.bias_activation_backward(*doubled(dy, gate, bias), activation=activation)
    assert dbias is not None and of_bias is not None
    assert_near(dx, exact, 2e-6)
    assert_near(dbias, of_bias, 1e-5)


@given(
    rows=st.integers(0, 5),
    width=WIDTHS,
    dtype=st.sampled_from(DTYPES),
    activation=st.sampled_from(ACTIVATIONS),
    seed=st.integers(0, 99),
)
def test_activations_are_near_float64(rows: int, width: int, dtype: torch.dtype, activation: str, seed: int) -> None:
    _check(dtype, rows, width, activation, seed)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_instruction_set_is_near_float64(instructions: str, activation: str) -> None:
    for dtype in DTYPES:
        _check(dtype, 3, 1031, activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_threads_share_rows(two_threads: None, activation: str) -> None:
    _check(torch.float32, 101, 768, activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_magnitude(instructions: str, activation: str) -> None:
    exponents = torch.arange(-126, 100).repeat_interleave(64)
    x = torch.ldexp(torch.linspace(1, 1.99, 64).repeat(226), exponents)
    x = torch.cat([-x, torch.zeros(1), x])[None]
    for found, exact in (
        (activations.bias_activation(x, None, activation), reference.bias_activation(x.double(), None, activation)),
        (
            activations.bias_activation_backward(torch.ones_like(x), x, None, activation)[0],
            reference.bias_activation_backward(torch.ones_like(x).double(), x.double(), None, activation)[0],
        ),
    ):
        assert found.isfinite().all()
        assert ((found.double() - exact).abs() <= 3e-7 * x.abs().clamp(max=6) + 3e-7 * exact.abs() + 2e-7).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_where_it_is_and_infinity_is_passed_on(dtype: torch.dtype, activation: str) -> None:
    x = random(dtype, 1, 40)
    x[0, 7], x[0, 20] = torch.nan, torch.inf
    y = activations.bias_activation(x, None, activation)
    assert y.isnan().nonzero().tolist() == [[0, 7]] and y[0, 20] == torch.inf


def test_gate_and_up_may_be_halves_of_one_tensor() -> None:
    both, dy = random(torch.float32, 4, 66), random(torch.float32, 4, 33)
    gate, up = both.chunk(2, dim=1)
    dense = gate.contiguous(), up.contiguous()
    assert torch.equal(activations.gated(gate, up, "silu"), activations.gated(*dense, "silu"))
    dgate, dup = activations.gated_backward(dy, gate, up, "silu")
    assert torch.equal(torch.cat([dgate, dup], 1), torch.cat(activations.gated_backward(dy, *dense, "silu"), 1))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_reference_is_what_autograd_finds(activation: str) -> None:
    gate, up, dy = (tensor.requires_grad_() for tensor in random(torch.float64, 3, 5, 33).unbind())
    bias = random(torch.float64, 33).requires_grad_()
    expected = torch.autograd.grad(reference.gated(gate, up, activation), (gate, up), dy)
    torch.testing.assert_close(reference.gated_backward(dy, gate, up, activation), expected)
    expected = torch.autograd.grad(reference.bias_activation(gate, bias, activation), (gate, bias), dy)
    torch.testing.assert_close(reference.bias_activation_backward(dy, gate, bias, activation), expected)


GOOD = torch.zeros(3, 8)


@pytest.mark.parametrize(
    ("name", "given_", "message"),
    [
        ("activation", "relu", "activation is 'relu', not 'silu' or 'gelu' or 'gelu_tanh'"),
        ("gate", GOOD.half(), "gate is torch.float16, not torch.float32 or torch.bfloat16"),
        ("gate", torch.zeros(8, 3).T, "gate has the stride 3 in its last dimension, not 1"),
        ("up", GOOD[:, 1:], r"up has the shape \[3, 7\], not \[3, 8\]"),
        ("up", GOOD.to("meta"), "up is on meta, not on the cpu"),
        ("dy", torch.zeros(3, 16)[:, :8], r"dy is not contiguous: its strides are \(16, 1\)"),
    ],
)
def test_an_argument_that_does_not_fit_is_named(name: str, given_: Any, message: str) -> None:
    arguments = {"dy": GOOD, "gate": GOOD, "up": GOOD, "activation": "silu", name: given_}
    with pytest.raises(ValueError, match=message):
        activations.gated_backward(**arguments)


def test_a_bias_that_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match=r"bias has the shape \[3\], not \[8\]"):
        activations.bias_activation(GOOD, torch.zeros(3), "gelu")
