"""Numbers of int8 and float8 with scales, and their products, beside float64; kernels in the interpreter."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt import _torch
from graphopt.triton_kernels.choice import KernelError
from graphopt.triton_kernels.quantization.reference import FLOAT8, LARGEST
from graphopt.triton_kernels.quantization.scaled import kernel
from graphopt.triton_kernels.quantization.scaled.op import (
    DYNAMIC_LINEAR,
    FLOAT,
    INT8,
    QUANTIZE_ROWS,
    QUANTIZE_TENSOR,
    SCALED_MM,
)
from tests.support.kernels import WAYS, assert_near, computed_by, in_interpreter, mode
from tests.triton_kernels.test_choice import _OnGpu

FORMATS = list(LARGEST)
# Relative distance of neighboring numbers of a format, and the least, over the largest.
STEPS = {torch.float8_e4m3fn: (2.0**-3, 2.0**-9), torch.float8_e5m2: (2.0**-2, 2.0**-16)}


def _ways(dtype) -> list[str]:
    return WAYS if dtype == torch.int8 else WAYS[:2]


OF_ALL = [(way, dtype) for dtype in FORMATS for way in _ways(dtype)]


def _half_a_step(wide, scale, dtype) -> torch.Tensor:
    if dtype == torch.int8:
        return 0.50001 * scale.expand_as(wide)
    relative, least = STEPS[dtype]
    return 0.50001 * torch.maximum(relative * wide.abs(), least * scale)


@given(
    shape=st.lists(st.integers(0, 3), max_size=2),
    width=st.integers(1, 300),
    dtype=st.sampled_from(FORMATS),
    of=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    size=st.sampled_from([1e-30, 1.0, 1e4]),
)
@settings(max_examples=25, deadline=None)
def test_numbers_are_within_half_a_step(shape, width, dtype, of, size) -> None:
    torch.manual_seed(0)
    x = (size * torch.randn(*shape, width)).to(of).float().nan_to_num(0, 0, 0).to(of)
    with mode("reference"):
        values, scales = QUANTIZE_ROWS(x, dtype)
        whole, scale = QUANTIZE_TENSOR(x, dtype)
    assert values.dtype == dtype and (values.shape, scales.shape, scale.shape) == (x.shape, x.shape[:-1], ())
    wide = x.float()
    for found, of_found in ((values, scales[..., None]), (whole, scale)):
        assert ((found.float() * of_found - wide).abs() <= _half_a_step(wide, of_found, dtype)).all()


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_triton_gives_the_reference_bit_for_bit(dtype) -> None:
    """Rows that are held together, alone, and streamed; rows apart; of ties, zeros, huge and tiny numbers."""
    wide = torch.randn(3, 40, dtype=torch.float32).half()
    ties = torch.arange(-127, 128).float()[None] / 2 + 0.25
    edges = torch.tensor([[0.0, 0.0, 0.0], [3e38, -3e38, 1.0], [1e-44, -1e-42, 1e-40], [1e-38, 0, 2e-38]])
    for x in (torch.randn(11, 100).bfloat16(), torch.randn(2, 1500), torch.randn(1, 20000), wide[:, 3:30], ties, edges):
        with mode("reference"):
            wanted = *QUANTIZE_ROWS(x, dtype), *QUANTIZE_TENSOR(x, dtype)
        with in_interpreter():
            found = *QUANTIZE_ROWS(x, dtype), *QUANTIZE_TENSOR(x, dtype)
        for one, other in zip(found, wanted, strict=True):
            assert one.dtype == other.dtype and torch.equal(one.float(), other.float())


@pytest.mark.parametrize(("way", "dtype"), OF_ALL, ids=str)
def test_a_row_that_is_not_finite_is_undefined(way, dtype) -> None:
    x = torch.randn(4, 30)
    x[0, 3], x[1, 4], x[2, 5] = torch.inf, -torch.inf, torch.nan
    with computed_by(way):
        values, scales = QUANTIZE_ROWS(x, dtype)
        whole, scale = QUANTIZE_TENSOR(x, dtype)
    assert scales.isnan().tolist() == [True, True, True, False] and bool(scale.isnan())
    assert (values[:3].float() == 0).all() and (whole.float() == 0).all()


def _operands(rows, outputs, inputs, dtype, per_row=True, per_output=True) -> Any:
    with mode("reference"):
        x, x_scales = (QUANTIZE_ROWS if per_row else QUANTIZE_TENSOR)(torch.randn(*rows, inputs), dtype)
        weight, scales = (QUANTIZE_ROWS if per_output else QUANTIZE_TENSOR)(torch.randn(outputs, inputs), dtype)
    return x, x_scales, weight, scales


def _product(operands, bias=None) -> torch.Tensor:
    x, x_scales, weight, weight_scales = operands
    scale = x_scales.double()[..., None] if x_scales.dim() else x_scales.double()
    y = (x.double() @ weight.double().T) * scale * weight_scales.double()
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize(("way", "dtype"), OF_ALL, ids=str)
@pytest.mark.parametrize("of", [torch.float32, torch.bfloat16], ids=str)
def test_products_are_those_of_float64(way, dtype, of) -> None:
    """Few rows, more; inputs that steps do not divide; scales of rows, of all; x with dimensions."""
    for rows, outputs, inputs, per_row, per_output, has_bias in (
        ((1,), 40, 64, True, True, False),
        ((3, 6), 7, 300, True, False, True),
        ((20,), 33, 17, False, True, True),
        ((70,), 9, 40, False, False, False),
        ((), 5, 128, True, True, True),
    ):
        operands = _operands(rows, outputs, inputs, dtype, per_row, per_output)
        bias = torch.randn(outputs).to(of) if has_bias else None
        with computed_by(way):
            found = SCALED_MM(*operands, bias, of)
        assert found.dtype == of
        assert_near([found], [_product(operands, bias)], 2)


@pytest.mark.parametrize("way", ["reference", "triton"])
def test_both_formats_of_float8_are_multiplied(way) -> None:
    x, x_scales, _, _ = _operands((5,), 4, 40, torch.float8_e5m2)
    _, _, weight, scales = _operands((5,), 4, 40, torch.float8_e4m3fn)
    with computed_by(way):
        found = SCALED_MM(x, x_scales, weight, scales, None, torch.float32)
    assert_near([found], [_product((x, x_scales, weight, scales))], 2)


@pytest.mark.parametrize("way", WAYS)
def test_sums_of_int8_are_exact(way) -> None:
    """Which float32 cannot hold: more than 2^24, and odd."""
    x = torch.full((1, 2049), 127, dtype=torch.int8)
    weight = torch.full((2, 2049), 127, dtype=torch.int8)
    weight[1], weight[1, 0] = -127, 127
    ones = torch.ones(1), torch.ones(2)
    with computed_by(way):
        found = SCALED_MM(x, ones[0], weight, ones[1], None, torch.float32)
    exact = torch.tensor([[2049 * 127 * 127, -2047 * 127 * 127]])
    assert torch.equal(found, exact.float())


@pytest.mark.parametrize(("way", "dtype"), OF_ALL, ids=str)
def test_a_linear_layer_quantizes_what_it_is_given(way, dtype) -> None:
    """Its result is that of its parts; its gradient as if nothing had been rounded."""
    x, bias = torch.randn(2, 3, 32, requires_grad=True), torch.randn(6, requires_grad=True)
    _, _, weight, scales = _operands((1,), 6, 32, dtype)
    seed = torch.randn(2, 3, 6)
    with computed_by(way):
        found = DYNAMIC_LINEAR(x, weight, scales, bias)
        of_x, of_bias = torch.autograd.grad(found, (x, bias), seed)
        values, of_rows = QUANTIZE_ROWS(x.detach(), dtype)
    assert_near([found], [_product((values, of_rows, weight, scales), bias.detach())], 2)
    dense = weight.double() * scales.double()[:, None]
    assert_near([of_x, of_bias], [seed.double() @ dense, seed.double().sum((0, 1))], 2)


@pytest.mark.parametrize(("way", "dtype"), OF_ALL, ids=str)
def test_nothing_gives_nothing(way, dtype) -> None:
    with computed_by(way):
        values, scales = QUANTIZE_ROWS(torch.zeros(0, 8), dtype)
        weight, weight_scales = QUANTIZE_ROWS(torch.ones(4, 8), dtype)
        assert SCALED_MM(values, scales, weight, weight_scales, None, torch.float32).shape == (0, 4)
        assert float(QUANTIZE_TENSOR(torch.zeros(0, 8), dtype)[1]) == 2.0**-126
        values, scales = QUANTIZE_ROWS(torch.zeros(2, 0), dtype)
        found = SCALED_MM(values, scales, values, scales, torch.ones(2), torch.float32)
        assert found.tolist() == [[1.0, 1.0]] * 2


def test_gpus_without_float8_multiply_int8(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    x = _OnGpu((4, 64), torch.bfloat16)
    with mode("auto"):
        assert INT8.choose(x).variant == "triton"
        variant, why = FLOAT.choose(x)
    assert variant == "reference" and "(8, 0) is below (8, 9)" in why
    with mode("triton"), pytest.raises(KernelError, match=r"\(8, 0\) is below \(8, 9\); reference takes it"):
        FLOAT.choose(x)


@pytest.mark.parametrize(
    ("shape", "dtypes", "per_row", "of", "is_torch"),
    [
        ((32, 48, 64), "e4m3fn e4m3fn", (True, True), torch.bfloat16, True),
        ((32, 48, 64), "e5m2 e4m3fn", (False, False), torch.bfloat16, True),
        ((32, 48, 64), "e5m2 e5m2", (True, True), torch.bfloat16, False),
        ((32, 48, 64), "e4m3fn e4m3fn", (True, False), torch.bfloat16, False),
        ((32, 48, 64), "e4m3fn e4m3fn", (True, True), torch.float32, False),
        ((32, 40, 64), "e4m3fn e4m3fn", (True, True), torch.bfloat16, False),
        ((32, 48, 72), "e4m3fn e4m3fn", (True, True), torch.bfloat16, False),
    ],
)
def test_torch_multiplies_float8_where_it_can(monkeypatch, shape, dtypes, per_row, of, is_torch) -> None:
    """As its own checks of tensors on a GPU say, which need none."""
    launched = []
    monkeypatch.setattr(kernel, "launch", lambda *arguments, **constants: launched.append(arguments))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    rows, outputs, inputs = shape
    of_x, of_weight = (getattr(torch, f"float8_{name}") for name in dtypes.split())
    with _torch.new_fake_mode():
        x = torch.empty(2, rows, inputs, device="cuda", dtype=of_x)
        weight = torch.empty(outputs, inputs, device="cuda", dtype=of_weight)
        x_scales = torch.empty((2, rows) if per_row[0] else (), device="cuda")
        weight_scales = torch.empty((outputs,) if per_row[1] else (), device="cuda")
        found = kernel.scaled_mm(x, x_scales, weight, weight_scales, None, of)
    assert found.shape == (2, rows, outputs) and found.dtype == of
    assert bool(launched) is not is_torch


KINDS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def test_operators_are_what_they_declare() -> None:
    for dtype in FORMATS:
        x = torch.randn(2, 3, 16)
        torch.library.opcheck(QUANTIZE_ROWS, (x, dtype))
        torch.library.opcheck(QUANTIZE_TENSOR, (x, dtype))
        values, x_scales, weight, scales = _operands((2, 3), 4, 16, dtype)
        bias = torch.randn(4, requires_grad=True)
        # Whether arguments are left as they are torch cannot tell of float8: it compares them by a product.
        kinds = KINDS if dtype == torch.int8 else KINDS[1:]
        torch.library.opcheck(SCALED_MM, (values, x_scales, weight, scales, None, torch.bfloat16), test_utils=kinds)
        torch.library.opcheck(DYNAMIC_LINEAR, (x.requires_grad_(), weight, scales, bias), test_utils=kinds)


def test_what_is_rounded_has_no_derivative() -> None:
    x = torch.randn(2, 4, requires_grad=True)
    for operator in (QUANTIZE_ROWS, QUANTIZE_TENSOR):
        with pytest.raises(NotImplementedError, match="has no derivative"):
            operator(x, torch.int8)[1].sum().backward()


X, SCALES, WEIGHT, OF_WEIGHT = _operands((3,), 4, 8, torch.int8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: QUANTIZE_ROWS(X, torch.int8), r"x is int8 \[3, 8\].*not floating"),
        (lambda: QUANTIZE_ROWS(torch.ones(2), torch.int4), "dtype is torch.int4, not torch.int8"),
        (lambda: QUANTIZE_TENSOR(torch.ones(2), torch.int32), "dtype is torch.int32, not torch.int8"),
        (lambda: SCALED_MM(torch.ones(3, 8), SCALES, WEIGHT, OF_WEIGHT, None, torch.float32), "x is torch.float32"),
        (lambda: SCALED_MM(X[0, 0], SCALES, WEIGHT, OF_WEIGHT, None, torch.float32), r"x is int8 \[\]"),
        (lambda: SCALED_MM(X, SCALES, WEIGHT[:, :7], OF_WEIGHT, None, torch.float32), r"weight is int8 \[4, 7\]"),
        (
            lambda: SCALED_MM(X, SCALES, WEIGHT.to(FLOAT8[0]), OF_WEIGHT, None, torch.float32),
            "weight is float8_e4m3fn.*not multiplied with x",
        ),
        (lambda: SCALED_MM(X, SCALES[:2], WEIGHT, OF_WEIGHT, None, torch.float32), r"x_scales are float32 \[2\]"),
        (lambda: SCALED_MM(X, SCALES, WEIGHT, OF_WEIGHT.double(), None, torch.float32), "weight_scales are float64"),
        (lambda: SCALED_MM(X, SCALES, WEIGHT, OF_WEIGHT, SCALES, torch.float32), r"bias is float32 \[3\].*\[4\]"),
        (lambda: SCALED_MM(X, SCALES, WEIGHT, OF_WEIGHT, None, torch.int8), "dtype is torch.int8, not floating"),
        (lambda: DYNAMIC_LINEAR(X, WEIGHT, OF_WEIGHT, None), "dynamic_linear: x is int8"),
        (lambda: DYNAMIC_LINEAR(torch.ones(3, 7), WEIGHT, OF_WEIGHT, None), "dynamic_linear: weight is int8"),
    ],
)
def test_bad_arguments_are_named(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()
