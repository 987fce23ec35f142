"""RMSNorm and LayerNorm in native code, against float64; and the reference against autograd."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from graphopt.cuda_ext import norms, reference
from tests.cuda_ext.nearness import DTYPES, assert_near, doubled, random

ROWS = st.integers(0, 5)
WIDTHS = st.one_of(st.integers(1, 200), st.sampled_from([768, 1023, 4096, 4097]))


def _made(dtype: torch.dtype, rows: int, width: int, seed: int, weight_dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    x, residual, dy, dsum = random(dtype, 4, rows, width, seed=seed)
    weight, bias = random(weight_dtype, 2, width, seed=seed + 1)
    return x + 0.5, residual, dy, dsum, weight, bias


def _check_rms(dtype: torch.dtype, rows: int, width: int, seed: int = 0, offset: float = 0.0, **how: Any) -> None:
    x, residual, dy, dsum, weight, _ = _made(dtype, rows, width, seed, how.get("weight_dtype", dtype))
    y, summed, inverse = norms.rms_norm(x, weight, 1e-5, residual, offset)
    assert summed is not None and torch.equal(summed, x + residual)
    expected, _, inverse64 = reference.rms_norm(summed.double(), weight.double(), 1e-5, None, offset)
    assert_near(y, expected)
    assert_near(inverse[:, None], inverse64[:, None])
    found = norms.rms_norm_backward(dy, summed, weight, inverse, dsum, offset)
    wide = reference.rms_norm_backward(
        *doubled(dy, summed, weight), inverse=inverse64, dsum=dsum.double(), offset=offset
    )
    for tensor, exact in zip(found, wide, strict=True):
        assert tensor is not None and exact is not None
        assert_near(tensor, exact, 2e-6)
    assert found[0].dtype == dtype and found[1] is not None and found[1].dtype == weight.dtype


def _check_layer(dtype: torch.dtype, rows: int, width: int, seed: int = 0, **how: Any) -> None:
    x, residual, dy, dsum, weight, bias = _made(dtype, rows, width, seed, how.get("weight_dtype", dtype))
    y, summed, mean, inverse = norms.layer_norm(x, weight, bias, 1e-2, residual)
    assert summed is not None and torch.equal(summed, x + residual)
    expected, _, mean64, inverse64 = reference.layer_norm(*doubled(summed, weight, bias), epsilon=1e-2)
    assert_near(y, expected, 3e-6)
    assert_near(mean, mean64, 3e-6)
    assert_near(inverse, inverse64, 3e-6)
    found = norms.layer_norm_backward(dy, summed, weight, mean, inverse, dsum)
    wide = reference.layer_norm_backward(
        *doubled(dy, summed, weight), mean=mean64, inverse=inverse64, dsum=dsum.double()
    )
    for tensor, exact in zip(found, wide, strict=True):
        assert tensor is not None and exact is not None
        assert_near(tensor, exact, 1e-5)


@given(
    rows=ROWS,
    width=WIDTHS,
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
    offset=st.sampled_from([0.0, 1.0]),
    float_weights=st.booleans(),
)
def test_norms_are_near_float64(
    rows: int, width: int, dtype: torch.dtype, seed: int, offset: float, float_weights: bool
) -> None:
    weight_dtype = torch.float32 if float_weights else dtype
    _check_rms(dtype, rows, width, seed, offset, weight_dtype=weight_dtype)
    _check_layer(dtype, rows, width, seed, weight_dtype=weight_dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [32, 4099, 131_072])
def test_every_instruction_set_is_near_float64(instructions: str, dtype: torch.dtype, width: int) -> None:
    _check_rms(dtype, 3, width)
    _check_layer(dtype, 3, width)


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_share_rows(two_threads: None, dtype: torch.dtype) -> None:
    _check_rms(dtype, 101, 768)
    _check_layer(dtype, 101, 768)
    x = random(dtype, 101, 768)
    shared = norms.rms_norm(x, None, 1e-6)[0]
    torch.set_num_threads(1)
    assert torch.equal(shared, norms.rms_norm(x, None, 1e-6)[0])


def test_weights_and_biases_may_be_missing() -> None:
    x, dy = random(torch.float32, 2, 7, 65)
    y, summed, inverse = norms.rms_norm(x, None, 1e-5)
    assert summed is None and norms.rms_norm_backward(dy, x, None, inverse)[1] is None
    assert_near(y, functional.rms_norm(x.double(), (65,), None, 1e-5))
    for weight, bias in ((None, None), (None, random(torch.float32, 65)), (random(torch.float32, 65), None)):
        y, _, mean, inverse = norms.layer_norm(x, weight, bias, 1e-5)
        wide = [None if each is None else each.double() for each in (weight, bias)]
        assert_near(y, functional.layer_norm(x.double(), (65,), *wide, eps=1e-5))
        dx, dweight, dbias = norms.layer_norm_backward(dy, x, weight, mean, inverse, has_bias=bias is not None)
        expected = reference.layer_norm_backward(dy, x, weight, mean, inverse, has_bias=bias is not None)
        for found, exact in zip((dx, dweight, dbias), expected, strict=True):
            assert (found is None) == (exact is None)
            if found is not None and exact is not None:
                assert_near(found, exact.double(), 3e-6)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_no_number_spoils_its_row_alone(dtype: torch.dtype, value: float) -> None:
    x, weight = random(dtype, 5, 100), random(dtype, 100)
    clean = norms.layer_norm(x, weight, weight, 1e-5)[0], norms.rms_norm(x, weight, 1e-5)[0]
    x[2, 37] = value
    layer, rms = norms.layer_norm(x, weight, weight, 1e-5)[0], norms.rms_norm(x, weight, 1e-5)[0]
    assert layer[2].isnan().all() and rms[2, 37].isnan()
    for found, before in zip((layer, rms), clean, strict=True):
        assert torch.equal(found[[0, 1, 3, 4]], before[[0, 1, 3, 4]])


def test_a_mean_far_from_zero_takes_nothing_from_the_variance() -> None:
    x = random(torch.float32, 4, 1000) + 3000
    y = norms.layer_norm(x, None, None, 1e-5)[0]
    # Elements are multiples of 2^-12 by then: the kernel is held to what it was given.
    assert_near(y, functional.layer_norm(x.double(), (1000,), None, None, 1e-5), 2e-4)


def test_the_reference_is_what_autograd_finds() -> None:
    x, residual, dy, dsum = (tensor.requires_grad_() for tensor in random(torch.float64, 4, 5, 33).unbind())
    weight, bias = (tensor.requires_grad_() for tensor in random(torch.float64, 2, 33).unbind())
    y, summed, inverse = reference.rms_norm(x, weight, 1e-5, residual, 1.0)
    assert summed is not None
    torch.testing.assert_close(y, functional.rms_norm(x + residual, (33,), weight + 1, 1e-5))
    expected = torch.autograd.grad((y, summed), (x, weight), (dy, dsum), retain_graph=True)
    torch.testing.assert_close(reference.rms_norm_backward(dy, summed, weight, inverse, dsum, 1.0), expected)
    y, summed, mean, inverse = reference.layer_norm(x, weight, bias, 1e-5, residual)
    assert summed is not None
    torch.testing.assert_close(y, functional.layer_norm(x + residual, (33,), weight, bias, 1e-5))
    expected = torch.autograd.grad((y, summed), (x, weight, bias), (dy, dsum))
    torch.testing.assert_close(reference.layer_norm_backward(dy, summed, weight, mean, inverse, dsum), expected)


GOOD = torch.zeros(3, 8)
BAD = [
    ("x", GOOD.double(), "x is torch.float64, not torch.float32 or torch.bfloat16"),
    ("x", GOOD.to("meta"), "x is on meta, not on the cpu"),
    ("x", GOOD[0], r"x has the shape \[8\], not \[any, any\]"),
    ("x", torch.zeros(8, 3).T, r"x is not contiguous: its strides are \(1, 3\)"),
    ("x", [1.0], "x is a list, not a tensor"),
    ("weight", torch.zeros(7), r"weight has the shape \[7\], not \[8\]"),
    ("weight", torch.zeros(8).bfloat16(), "weight is torch.bfloat16, not torch.float32"),
    ("residual", GOOD.bfloat16(), "residual is torch.bfloat16, not torch.float32"),
    ("residual", GOOD[:2], r"residual has the shape \[2, 8\], not \[3, 8\]"),
]


@pytest.mark.parametrize(("name", "tensor", "message"), BAD)
def test_an_argument_that_does_not_fit_is_named(name: str, tensor: Any, message: str) -> None:
    arguments = {"x": GOOD, "weight": torch.zeros(8), "residual": GOOD, "epsilon": 1e-5, name: tensor}
    with pytest.raises(ValueError, match=message):
        norms.rms_norm(**arguments)
    with pytest.raises(ValueError, match=message):
        norms.layer_norm(bias=None, **arguments)


@pytest.mark.parametrize(("name", "shape"), [("dy", (3, 7)), ("dsum", (2, 8)), ("inverse", (4,)), ("mean", (3, 1))])
def test_an_argument_of_backward_that_does_not_fit_is_named(name: str, shape: tuple[int, ...]) -> None:
    rows = torch.zeros(3)
    arguments = {"dy": GOOD, "x": GOOD, "weight": None, "mean": rows, "inverse": rows, name: torch.zeros(shape)}
    with pytest.raises(ValueError, match=f"{name} has the shape"):
        norms.layer_norm_backward(**arguments)
