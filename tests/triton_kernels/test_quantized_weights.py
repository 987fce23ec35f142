"""Linear layers with weights of 8 and 4 bits beside float64; their Triton kernels in the interpreter."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from graphopt.cuda_ext.quantized import quantize
from graphopt.triton_kernels.quantization.linear import quantize_linear
from graphopt.triton_kernels.quantization.weights import kernel
from graphopt.triton_kernels.quantization.weights.op import DEQUANTIZE_WEIGHT, QUANTIZE_WEIGHT, QUANTIZED_LINEAR
from tests.support.kernels import WAYS, assert_near, computed_by, gradients, in_interpreter, mode


def _held(outputs, inputs, bits, group, has_zeros=False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    values, scales, zeros = QUANTIZE_WEIGHT(torch.randn(outputs, inputs) + has_zeros, bits, group, has_zeros)
    return values, scales, zeros if has_zeros else None


def _check(x, held, bias, bits, factor=2.0) -> None:
    """Result and gradients beside a product with the same weights in float64."""
    dense = DEQUANTIZE_WEIGHT(*held, bits, torch.float64)

    def ours(x, *bias):
        return QUANTIZED_LINEAR(x, *held, bias[0] if bias else None, bits)

    def theirs(x, *bias):
        return x @ dense.T + (bias[0] if bias else 0)

    given = [x] if bias is None else [x, bias]
    doubles = [tensor.double() for tensor in given]
    seed = torch.randn(*x.shape[:-1], len(dense)).to(x.dtype)
    assert_near([ours(*given)], [theirs(*doubles)], factor)
    assert_near(gradients(ours, given, [seed]), gradients(theirs, doubles, [seed.double()]), 2 * factor)


@given(
    shape=st.lists(st.integers(0, 4), max_size=2),
    outputs=st.integers(1, 9),
    groups=st.integers(1, 4),
    half=st.integers(1, 20),
    bits=st.sampled_from([8, 4]),
    has_zeros=st.booleans(),
    has_bias=st.booleans(),
)
@settings(max_examples=20, deadline=None)
def test_the_reference_is_a_product(shape, outputs, groups, half, bits, has_zeros, has_bias) -> None:
    torch.manual_seed(0)
    held = _held(outputs, groups * 2 * half, bits, 2 * half, has_zeros)
    bias = torch.randn(outputs, dtype=torch.float64) if has_bias else None
    with mode("reference"):
        _check(torch.randn(*shape, groups * 2 * half, dtype=torch.float64), held, bias, bits, 10)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    ("way", "dtype"),
    [("triton", torch.float32), ("triton", torch.bfloat16), ("triton", torch.float16), ("cuda", torch.float32),
     ("cuda", torch.bfloat16)],
    ids=str,
)  # fmt: skip
def test_kernels_are_a_product(way, dtype, bits) -> None:
    """One row, several, more than a tile has; groups that steps do not divide, all inputs one group; rows apart."""
    with computed_by(way):
        for rows, outputs, groups, group, has_zeros in (
            (1, 70, 8, 32, False),
            (17, 5, 3, 36, True),
            (2, 3, 1, 200, True),
        ):
            held = _held(outputs, groups * group, bits, group, has_zeros)
            bias = torch.randn(outputs).to(dtype) if has_zeros else None
            _check(torch.randn(rows, groups * group).to(dtype), held, bias, bits)
        wide = torch.randn(3, 100).to(dtype)
        _check(wide[:, 10:74], _held(4, 64, bits, 16), torch.randn(4), bits)


@pytest.mark.parametrize("bits", [8, 4])
def test_programs_that_share_inputs_give_one_sum(bits) -> None:
    """Of many steps, which one program would take alone if there were more tiles."""
    held, x, bias = _held(6, 16 * 128, bits, 128), torch.randn(2, 16 * 128), torch.randn(6)
    with in_interpreter():
        found = kernel.quantized_linear(x, *held, bias, bits)
    assert_near([found], [x.double() @ DEQUANTIZE_WEIGHT(*held, bits, torch.float64).T + bias], 2)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_rows_are_a_product_with_floats(bits, dtype) -> None:
    held = _held(6, 64, bits, 32, True)
    with in_interpreter():
        _check(torch.randn(513, 64).to(dtype), held, torch.randn(6), bits)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("has_zeros", [False, True])
def test_weights_are_within_half_a_step(way, bits, has_zeros) -> None:
    """Also those of one number, of zeros, and tiny ones."""
    weight = torch.randn(16, 96)
    weight[0, :32], weight[1, :32], weight[2, :32] = 0, 3.5, -1e-30
    values, scales, zeros = QUANTIZE_WEIGHT(weight, bits, 32, has_zeros)
    assert values.numel() * 8 == weight.numel() * bits
    with computed_by(way):
        found = DEQUANTIZE_WEIGHT(values, scales, zeros, bits, torch.float32)
    steps = scales.repeat_interleave(32, 1)
    assert ((found - weight).abs() <= 0.50001 * steps).all()
    assert (found[0, :32] == 0).all()
    torch.testing.assert_close(found[1:3, :32], weight[1:3, :32], rtol=1e-6, atol=0)


@pytest.mark.parametrize("bits", [8, 4])
def test_the_format_is_that_of_the_cpu_bit_for_bit(bits) -> None:
    weight = torch.randn(5, 64)
    held = quantize(weight, bits, 16, True)
    found = QUANTIZE_WEIGHT(weight, bits, 16, True)
    assert all(map(torch.equal, found, (held.values, held.scales, held.zeros)))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bits", [8, 4])
def test_a_group_that_is_not_finite_makes_its_outputs_undefined(way, bits) -> None:
    weight = torch.randn(3, 64)
    weight[0, 40], weight[1, 2] = torch.inf, torch.nan
    held = QUANTIZE_WEIGHT(weight, bits, 32, False)
    with computed_by(way):
        dense = DEQUANTIZE_WEIGHT(*held, bits, torch.float32)
        found = QUANTIZED_LINEAR(torch.randn(2, 64), *held, None, bits)
    assert dense.isnan().view(3, 2, 32).all(-1).tolist() == [[False, True], [True, False], [False, False]]
    assert dense.isnan().sum() == 64 and found.isnan().tolist() == [[True, True, False]] * 2


@pytest.mark.parametrize("way", WAYS)
def test_nothing_gives_nothing(way) -> None:
    with computed_by(way):
        held = _held(4, 8, 8, 4)
        assert QUANTIZED_LINEAR(torch.zeros(0, 8), *held, None, 8).shape == (0, 4)
        empty = torch.zeros(0, 8, dtype=torch.int8), torch.zeros(0, 2), None
        assert QUANTIZED_LINEAR(torch.zeros(3, 8), *empty, None, 8).shape == (3, 0)
        without = torch.zeros(3, 0, dtype=torch.int8), torch.zeros(3, 0), None
        bias = torch.arange(3.0)
        assert torch.equal(QUANTIZED_LINEAR(torch.zeros(2, 0), *without, bias, 8), bias.expand(2, 3))


def test_operators_are_what_they_declare() -> None:
    for bits in (8, 4):
        values, scales, zeros = QUANTIZE_WEIGHT(torch.randn(6, 16), bits, 8, True)
        x, bias = torch.randn(2, 3, 16, requires_grad=True), torch.randn(6, requires_grad=True)
        torch.library.opcheck(QUANTIZE_WEIGHT, (torch.randn(6, 16), bits, 8, False))
        torch.library.opcheck(DEQUANTIZE_WEIGHT, (values, scales, zeros, bits, torch.bfloat16))
        torch.library.opcheck(QUANTIZED_LINEAR, (x, values, scales, zeros, bias, bits))
        torch.library.opcheck(QUANTIZED_LINEAR, (x.detach().bfloat16(), values, scales, None, None, bits))
        doubles = (x.detach().double().requires_grad_(), bias.detach().double().requires_grad_())
        assert torch.autograd.gradcheck(
            lambda x, b, held=(values, scales, zeros), bits=bits: QUANTIZED_LINEAR(x, *held, b, bits), doubles
        )


def test_what_is_rounded_has_no_derivative() -> None:
    with pytest.raises(NotImplementedError, match="graphopt::quantize_weight has no derivative"):
        QUANTIZE_WEIGHT(torch.randn(2, 4, requires_grad=True), 8, 2, False)[1].sum().backward()
    values, scales, _ = _held(2, 4, 8, 2)
    with pytest.raises(ValueError, match="scales and zeros are constants, and one requires a gradient"):
        QUANTIZED_LINEAR(torch.randn(2, 4), values, scales.requires_grad_(), None, None, 8)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_linear_layer_becomes_a_quantized_one(bits) -> None:
    layer = nn.Linear(64, 10)
    found = quantize_linear(layer, bits, 32, has_zeros=True)
    assert [name for name, _ in found.named_parameters()] == ["bias"] and found.bias is layer.bias
    x = torch.randn(3, 64, requires_grad=True)
    # Each weight is off by half a step at most, which is half the range of a normal sample over its steps.
    bound = 0.5 * float(found.scales.max()) * x.abs().sum(-1, keepdim=True)
    assert ((found(x) - layer(x)).abs() <= bound).all()
    found(x).sum().backward()
    assert x.grad is not None and layer.weight.grad is None and layer.bias.grad.tolist() == [3.0] * 10
    assert str(found) == f"QuantizedLinear(outputs=10, groups=2, bits={bits})"
    copied = quantize_linear(nn.Linear(64, 10), bits, 32, has_zeros=True)
    copied.load_state_dict(found.state_dict())
    assert torch.equal(copied(x), found(x))


HELD = _held(4, 8, 8, 4)[:2]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda v, s: QUANTIZE_WEIGHT(v, 8, 4, False), r"weight is int8 \[4, 8\].*not floating"),
        (lambda v, s: QUANTIZE_WEIGHT(s[0], 8, 2, False), r"weight is float32 \[2\].*not \[outputs, inputs\]"),
        (lambda v, s: QUANTIZE_WEIGHT(torch.ones(2, 8), 5, 4, False), "bits is 5, not 8 or 4"),
        (lambda v, s: QUANTIZE_WEIGHT(torch.ones(2, 8), 8, 3, False), "group is 3, not a divisor of 8 inputs"),
        (lambda v, s: QUANTIZE_WEIGHT(torch.ones(2, 6), 4, 3, False), "group is 3, not an even divisor of 6 inputs"),
        (lambda v, s: DEQUANTIZE_WEIGHT(v, s, None, 4, torch.float32), "values are int8.*not torch.uint8"),
        (lambda v, s: DEQUANTIZE_WEIGHT(v, s, None, 8, torch.int32), "dtype is torch.int32, not floating"),
        (lambda v, s: DEQUANTIZE_WEIGHT(v, s.double(), None, 8, torch.float32), "scales are float64"),
        (lambda v, s: DEQUANTIZE_WEIGHT(v, s[:3], None, 8, torch.float32), r"scales are float32 \[3, 2\]"),
        (lambda v, s: DEQUANTIZE_WEIGHT(v, s.repeat(1, 2)[:, :3], None, 8, torch.float32), "scales have 3 groups"),
        (lambda v, s: DEQUANTIZE_WEIGHT(v, s, s[:, :1], 8, torch.float32), r"zeros are float32 \[4, 1\].*\[4, 2\]"),
        (lambda v, s: QUANTIZED_LINEAR(torch.ones(2, 7), v, s, None, None, 8), r"x is float32 \[2, 7\].*\[..., 8\]"),
        (lambda v, s: QUANTIZED_LINEAR(v, v, s, None, None, 8), "x is int8.*not floating"),
        (lambda v, s: QUANTIZED_LINEAR(torch.ones(2, 8), v, s, None, s[0], 8), r"bias is float32 \[2\].*\[4\]"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call(*HELD)
