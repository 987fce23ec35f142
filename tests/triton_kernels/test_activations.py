"""Gated and biased activations beside those of torch in float64; their Triton kernels in the interpreter."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from graphopt.triton_kernels.activations.op import BIAS_ACTIVATION, BIAS_ACTIVATION_BACKWARD, GATED, GATED_BACKWARD
from tests.support.kernels import WAYS, assert_near, computed_by, gradients, mode

OF_TORCH = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}
activations = pytest.mark.parametrize("activation", OF_TORCH)


def _compare(pair, tensors) -> None:
    """Results and gradients of both functions of a pair."""
    ours, theirs = pair
    doubles = [tensor.double() for tensor in tensors]
    found, wanted = ours(*tensors), theirs(*doubles)
    seed = torch.randn_like(found)
    assert_near([found], [wanted])
    assert_near(gradients(ours, tensors, [seed]), gradients(theirs, doubles, [seed.double()]))


def _gated(activation):
    return lambda gate, up: GATED(gate, up, activation), lambda gate, up: OF_TORCH[activation](gate) * up


def _biased(activation):
    return (
        lambda x, bias=None: BIAS_ACTIVATION(x, bias, activation),
        lambda x, bias=0: OF_TORCH[activation](x + bias),
    )


@activations
@given(shape=st.lists(st.integers(1, 6), min_size=1, max_size=3), has_bias=st.booleans())
@settings(max_examples=10, deadline=None)
def test_references_are_those_of_torch(activation, shape, has_bias) -> None:
    torch.manual_seed(0)
    x, up = (3 * torch.randn(shape, dtype=torch.float64) for _ in range(2))
    with mode("reference"):
        _compare(_gated(activation), [x, up])
        _compare(_biased(activation), [x, torch.randn(shape[-1]).double()] if has_bias else [x])


@activations
@pytest.mark.parametrize(
    ("way", "dtype"),
    [("triton", torch.float32), ("triton", torch.bfloat16), ("triton", torch.float16), ("cuda", torch.float32),
     ("cuda", torch.bfloat16)],
    ids=str,
)  # fmt: skip
def test_kernels_are_those_of_torch(activation, way, dtype) -> None:
    """Rows narrow, wider than a tile of columns, more of them than a tile has; side by side and not."""
    with computed_by(way):
        packed = (3 * torch.randn(3, 5, 66)).to(dtype)
        _compare(_gated(activation), packed.chunk(2, -1))
        _compare(_gated(activation), [(3 * torch.randn(2, 2500)).to(dtype) for _ in range(2)])
        _compare(_biased(activation), [packed, torch.randn(66).to(dtype)])
        _compare(_biased(activation), [(3 * torch.randn(3, 1500)).to(dtype), torch.randn(1500).to(dtype)])
        _compare(_biased(activation), [packed[..., 3:40]])


@activations
@pytest.mark.parametrize("way", WAYS)
def test_what_is_large_or_undefined_is_as_in_torch(activation, way) -> None:
    x = torch.tensor([float("nan"), 90.0, -90.0, 1e4, -1e4, 0.0, -0.0, 1e-30])
    with computed_by(way):
        found = BIAS_ACTIVATION(x, None, activation)
    torch.testing.assert_close(found, OF_TORCH[activation](x), equal_nan=True, atol=1e-30, rtol=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_nothing_gives_nothing(way) -> None:
    x, bias = torch.randn(0, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    with computed_by(way):
        assert GATED(x, x, "silu").shape == (0, 8)
        of_x, of_bias = torch.autograd.grad(BIAS_ACTIVATION(x, bias, "gelu").sum(), (x, bias))
    assert of_x.shape == (0, 8) and not of_bias.any()


@activations
def test_operators_are_what_they_declare(activation) -> None:
    x, up = (torch.randn(3, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    bias = torch.randn(8, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(GATED, (x, up, activation))
    torch.library.opcheck(BIAS_ACTIVATION, (x, bias, activation))
    torch.library.opcheck(BIAS_ACTIVATION, (x[:, :3], None, activation))
    plain = x.detach()
    torch.library.opcheck(GATED_BACKWARD, (plain, plain.t().contiguous().t(), plain, activation))
    torch.library.opcheck(BIAS_ACTIVATION_BACKWARD, (plain, plain, bias.detach(), activation))
    torch.library.opcheck(BIAS_ACTIVATION_BACKWARD, (plain.bfloat16(), plain.bfloat16(), None, activation))
    assert torch.autograd.gradcheck(lambda a, b: GATED(a, b, activation), (x, up))
    assert torch.autograd.gradcheck(lambda a, b: BIAS_ACTIVATION(a, b, activation), (x, bias))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: GATED(x, x[:2], "silu"), r"gated: up is float32 \[2, 8\].*not float32 \[3, 8\]"),
        (lambda x: GATED(x.int(), x, "silu"), "gated: gate is int32"),
        (lambda x: GATED(x, x, "swish"), "gated: activation is 'swish': choose from silu, gelu, gelu_tanh"),
        (lambda x: BIAS_ACTIVATION(x, x[0, :3], "gelu"), r"bias_activation: bias is float32 \[3\]"),
        (lambda x: BIAS_ACTIVATION(x, None, "gelutanh"), "the nearest is 'gelu_tanh'"),
        (lambda x: GATED_BACKWARD(x, x, x.double(), "silu"), "gated_backward: up is float64"),
    ],
)
def test_bad_arguments_are_named(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.randn(3, 8))
