"""Products with weights of few bits in native code, against the same weights in float64."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphopt.cuda_ext import reference
from graphopt.cuda_ext.quantized import Quantized, linear, quantize
from tests.cuda_ext.nearness import DTYPES, random


def _check(dtype: torch.dtype, rows: int, outputs: int, groups: int, group: int, bits: int, **how: Any) -> None:
    seed, has_zeros, has_bias = how.get("seed", 0), how.get("has_zeros", False), how.get("has_bias", False)
    inputs = groups * group
    held = quantize(random(torch.float32, outputs, inputs, seed=seed), bits, group, has_zeros)
    x = random(dtype, rows, inputs, seed=seed + 1)
    bias = random(dtype, outputs, seed=seed + 2) if has_bias else None
    found = linear(x, held, bias)
    zeros = None if held.zeros is None else held.zeros.double()
    weight = reference.dequantized(held.values, held.scales.double(), zeros, bits)
    expected = x.double() @ weight.T + (0 if bias is None else bias.double())
    # As many roundings as a sum of this length has at most, of what is added up.
    magnitude = x.double().abs() @ weight.abs().T + (0 if bias is None else bias.double().abs())
    allowed = 2e-7 * magnitude + (expected.abs() * 2.0**-8 if dtype == torch.bfloat16 else 0)
    assert found.dtype == dtype and found.shape == (rows, outputs)
    assert ((found.double() - expected).abs() <= allowed).all()


@given(
    rows=st.integers(0, 9),
    outputs=st.integers(0, 7),
    groups=st.integers(1, 4),
    half=st.one_of(st.integers(1, 40), st.sampled_from([64, 128])),
    bits=st.sampled_from([8, 4]),
    dtype=st.sampled_from(DTYPES),
    has_zeros=st.booleans(),
    has_bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_products_are_near_float64(
    rows: int, outputs: int, groups: int, half: int, bits: int, dtype: torch.dtype, **how: Any
) -> None:
    _check(dtype, rows, outputs, groups, 2 * half, bits, **how)
    if bits == 8:
        _check(dtype, rows, outputs, groups, 2 * half - 1, bits, **how)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set_is_near_float64(instructions: str, bits: int, dtype: torch.dtype) -> None:
    for rows in (1, 5, 16):
        _check(dtype, rows, 37, 8, 128, bits, has_zeros=True, has_bias=True)


def test_threads_share_outputs(two_threads: None) -> None:
    _check(torch.float32, 3, 131, 4, 128, 4)


@pytest.mark.parametrize("has_zeros", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
def test_weights_are_held_to_half_a_step(bits: int, has_zeros: bool) -> None:
    weight = random(torch.float32, 16, 128) + (0.5 if has_zeros else 0)
    weight[3, :32] = 0
    held = quantize(weight, bits, 32, has_zeros)
    assert (held.outputs, held.inputs, held.group, held.bits) == (16, 128, 32, bits)
    assert held.values.numel() * 8 == weight.numel() * bits
    found = reference.dequantized(held.values, held.scales, held.zeros, bits)
    steps = held.scales.repeat_interleave(32, 1)
    assert ((found - weight).abs() <= 0.5001 * steps + 1e-6).all()
    assert (found[3, :32] == 0).all()


def test_the_order_of_four_bits() -> None:
    values = torch.tensor([[0x2_1, 0x4_3, 0x6_5, 0x8_7]], dtype=torch.uint8)
    held = Quantized(values, torch.tensor([[1.0, 10.0]]), torch.zeros(1, 2), 4)
    expected = [1.0, 3, 2, 4, 50, 70, 60, 80]
    assert reference.dequantized(held.values, held.scales, held.zeros, 4).tolist() == [expected]
    assert linear(torch.eye(8), held)[:, 0].tolist() == expected


def test_without_inputs_the_bias_is_left() -> None:
    held = Quantized(torch.zeros(3, 0, dtype=torch.int8), torch.zeros(3, 0), None, 8)
    assert torch.equal(linear(torch.zeros(2, 0), held, torch.arange(3.0)), torch.arange(3.0).expand(2, 3))


HELD = quantize(torch.ones(4, 8), 8)


@pytest.mark.parametrize(
    ("x", "held", "bias", "message"),
    [
        (torch.zeros(2, 7), HELD, None, r"x has the shape \[2, 7\], not \[any, 8\]"),
        (torch.zeros(2, 8).double(), HELD, None, "x is torch.float64"),
        (torch.zeros(2, 8), HELD, torch.zeros(3), r"bias has the shape \[3\], not \[4\]"),
        (
            torch.zeros(2, 8),
            Quantized(HELD.values, HELD.scales, None, 4),
            None,
            "values is torch.int8, not torch.uint8",
        ),
        (torch.zeros(2, 8), Quantized(HELD.values, HELD.scales, None, 5), None, "bits is 5, not 8 or 4"),
        (torch.zeros(2, 8), Quantized(HELD.values, torch.zeros(4, 3), None, 8), None, "scales has 3 groups"),
        (torch.zeros(2, 8), Quantized(HELD.values, HELD.scales, torch.zeros(4, 2), 8), None, "zeros has the shape"),
    ],
)
def test_an_argument_that_does_not_fit_is_named(
    x: torch.Tensor, held: Quantized, bias: torch.Tensor | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        linear(x, held, bias)


@pytest.mark.parametrize(("bits", "group"), [(8, 3), (4, 1), (4, 0), (8, 16)])
def test_groups_that_do_not_divide_the_inputs_are_named(bits: int, group: int) -> None:
    with pytest.raises(ValueError, match=rf"group is {group}, not an? (even )?divisor of 8 inputs"):
        quantize(torch.ones(4, 8), bits, group)
