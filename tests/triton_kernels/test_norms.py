"""Norms beside those of torch in float64; their Triton kernels, in the interpreter, beside the reference."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from graphopt.ir.effects import draws
from graphopt.triton_kernels.norms.dropout import DROPOUT_MASK
from graphopt.triton_kernels.norms.op import (
    ADD_LAYER_NORM,
    ADD_RMS_NORM,
    LAYER_NORM,
    LAYER_NORM_BACKWARD,
    RMS_NORM,
    RMS_NORM_BACKWARD,
)
from tests.support.kernels import WAYS, assert_near, computed_by, gradients, in_interpreter, mode

EPSILON = 1e-5
KERNELS = [("triton", dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
KERNELS += [("cuda", dtype) for dtype in (torch.float32, torch.bfloat16)]


def _rms(x, residual, weight, offset=0.0) -> Any:
    if residual is None:
        return RMS_NORM(x, weight, EPSILON, offset, False)[0]
    return ADD_RMS_NORM(x, residual, weight, EPSILON, offset, False)[:2]


def _layer(x, residual, weight, bias) -> Any:
    if residual is None:
        return LAYER_NORM(x, weight, bias, EPSILON)[0]
    return ADD_LAYER_NORM(x, residual, weight, bias, EPSILON)[:2]


def _torch_rms(x, residual, weight, offset=0.0) -> Any:
    total = x if residual is None else x + residual
    y = F.rms_norm(total, x.shape[-1:], None if weight is None else offset + weight, EPSILON)
    return y if residual is None else (y, total)


def _torch_layer(x, residual, weight, bias) -> Any:
    total = x if residual is None else x + residual
    y = F.layer_norm(total, x.shape[-1:], weight, bias, EPSILON)
    return y if residual is None else (y, total)


def _drawn(shape, dtype, has_residual=True, has_weight=True, has_bias=True) -> list[torch.Tensor | None]:
    """x, residual, weight and bias."""
    given = (True, has_residual, has_weight, has_bias)
    shapes = (shape, shape, shape[-1:], shape[-1:])
    return [torch.randn(each).to(dtype) if wanted else None for each, wanted in zip(shapes, given, strict=True)]


def _double(tensors) -> list[torch.Tensor | None]:
    return [tensor if tensor is None else tensor.double() for tensor in tensors]


def _compare(ours, theirs, tensors, factor: float) -> None:
    """Results and gradients of `ours`, by what is chosen, and of `theirs` in float64."""
    given = [tensor for tensor in tensors if tensor is not None]

    def with_absent(function):
        def call(*some):
            left = iter(some)
            results = function(*(None if tensor is None else next(left) for tensor in tensors))
            return results if isinstance(results, tuple) else (results,)

        return call

    found = with_absent(ours)(*given)
    wanted = with_absent(theirs)(*_double(given))
    seeds = [torch.randn_like(result) for result in found]
    of_ours = gradients(with_absent(ours), given, seeds)
    of_theirs = gradients(with_absent(theirs), _double(given), _double(seeds))
    assert_near(found, wanted, factor)
    assert_near(of_ours, of_theirs, factor)


@given(
    shape=st.lists(st.integers(1, 5), max_size=2),
    width=st.integers(4, 40),
    flags=st.tuples(*[st.booleans()] * 3),
    offset=st.sampled_from([0.0, 1.0]),
)
@settings(max_examples=30, deadline=None)
def test_references_are_the_norms_of_torch(shape, width, flags, offset) -> None:
    torch.manual_seed(0)
    x, residual, weight, bias = _drawn((*shape, width), torch.float64, *flags)
    with mode("reference"):
        _compare(
            lambda *t: _rms(*t, offset=offset), lambda *t: _torch_rms(*t, offset=offset), [x, residual, weight], 10
        )
        _compare(_layer, _torch_layer, [x, residual, weight, bias], 100)


@pytest.mark.parametrize(("way", "dtype"), KERNELS, ids=str)
@pytest.mark.parametrize(
    ("shape", "flags"),
    [((3, 33), (True, True, True)), ((2, 3, 128), (False, True, False)), ((70, 32), (True, False, True)),
     ((1, 7), (False, True, True)), ((5,), (True, True, True)), ((2, 1000), (False, False, False))],
)  # fmt: skip
def test_kernels_are_the_norms_of_torch(shape, flags, way, dtype) -> None:
    x, residual, weight, bias = _drawn(shape, dtype, *flags)
    with computed_by(way):
        _compare(lambda *t: _rms(*t, offset=1.0), lambda *t: _torch_rms(*t, offset=1.0), [x, residual, weight], 2)
        _compare(_layer, _torch_layer, [x, residual, weight, bias], 2)


def test_rows_too_wide_to_be_held_are_streamed() -> None:
    """Also where their last block is not full, and the mean is far from zero."""
    x, residual, weight, bias = _drawn((2, 16400), torch.float32)
    with in_interpreter():
        _compare(_rms, _torch_rms, [x, residual, weight], 4)
        _compare(_layer, _torch_layer, [x, None, weight, bias], 4)
        mean, inverse = LAYER_NORM(x + 1000, None, None, EPSILON)[1:]
    shifted = (x + 1000).double()
    assert_near((mean, inverse), (shifted.mean(-1), shifted.var(-1, correction=0).add(EPSILON).rsqrt()), 4)


def test_a_row_is_rounded_before_it_is_weighted_where_that_is_asked() -> None:
    """As Llama's norm does."""
    x, _, weight, _ = _drawn((4, 64), torch.bfloat16)
    wanted = weight * F.rms_norm(x.float(), (64,), None, EPSILON).bfloat16()
    with mode("reference"):
        assert torch.equal(RMS_NORM(x, weight, EPSILON, 0.0, True)[0], wanted)
    for way in ("triton", "cuda"):
        with computed_by(way):
            found = RMS_NORM(x, weight, EPSILON, 0.0, True)[0]
        assert (found != wanted).float().mean() < 0.02  # where the reciprocal root differs in its last bit
        assert_near([found], [wanted])


@pytest.mark.parametrize("way", ["triton", "cuda"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_stays_in_its_row(value, way) -> None:
    x, weight, bias = torch.randn(3, 40), torch.randn(40), torch.randn(40)
    x[1, 7] = value
    for function in (lambda: RMS_NORM(x, weight, EPSILON, 0.0, False), lambda: LAYER_NORM(x, weight, bias, EPSILON)):
        with mode("reference"):
            wanted = function()
        with computed_by(way):
            found = function()
        assert_near(found, wanted, 2)
        assert found[0][[0, 2]].isfinite().all()


@pytest.mark.parametrize("way", WAYS)
def test_rows_may_be_apart_and_turned(way) -> None:
    wide = torch.randn(6, 100)
    for x in (wide[:, 10:60], wide[::2, :50], wide.t(), wide[:1].expand(4, 100)):
        with mode("reference"):
            wanted = RMS_NORM(x.contiguous(), None, EPSILON, 0.0, False)
        with computed_by(way):
            found = RMS_NORM(x, None, EPSILON, 0.0, False)
        assert_near(found, wanted, 2)
        assert all(result.is_contiguous() for result in found)


@pytest.mark.parametrize("way", WAYS)
def test_no_row_gives_no_row_and_gradients_of_zero(way) -> None:
    x, weight = torch.randn(0, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    with computed_by(way):
        for y in (_rms(x, None, weight), _layer(x, None, weight, weight)):
            (of_weight,) = torch.autograd.grad(y.sum(), weight)
            assert y.shape == (0, 8) and not of_weight.any()


@pytest.mark.parametrize(("way", "dtype"), [*KERNELS, ("reference", torch.float64)], ids=str)
@pytest.mark.parametrize("shape", [(3, 33), (70, 32), (5,)])
def test_a_summand_may_be_what_dropout_leaves(shape, way, dtype) -> None:
    tensors = _drawn(shape, dtype)
    mask, scale = torch.rand(shape) < 0.7, 1 / 0.7

    def dropped(function):
        return lambda x, *others: function(x * mask * scale, *others)

    with computed_by(way):
        _compare(
            lambda x, r, w: ADD_RMS_NORM(x, r, w, EPSILON, 1.0, False, mask, scale)[:2],
            dropped(lambda *t: _torch_rms(*t, offset=1.0)),
            tensors[:3],
            2,
        )
        _compare(
            lambda x, r, w, b: ADD_LAYER_NORM(x, r, w, b, EPSILON, mask, scale)[:2], dropped(_torch_layer), tensors, 2
        )


def test_what_is_streamed_may_be_dropped_out() -> None:
    tensors, mask = _drawn((2, 16400), torch.float32), torch.rand(2, 16400) < 0.5
    with in_interpreter():
        _compare(
            lambda x, r, w, b: ADD_LAYER_NORM(x, r, w, b, EPSILON, mask, 2.0)[:2],
            lambda x, *others: _torch_layer(x * mask * 2.0, *others),
            tensors,
            4,
        )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("given", "wanted"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_the_result_may_be_of_another_dtype(given, wanted, way) -> None:
    """Rounded once, from float32; gradients of x are of the dtype of x."""
    x, residual = torch.randn(2, 6, 40).to(given)
    weight, bias = torch.randn(2, 40)

    def ours(x, residual):
        return (
            RMS_NORM(x, weight, EPSILON, 0.0, False, wanted)[0],
            ADD_RMS_NORM(x, residual, weight, EPSILON, 0.0, False, dtype=wanted)[0],
            LAYER_NORM(x, weight, bias, EPSILON, wanted)[0],
            ADD_LAYER_NORM(x, residual, weight, bias, EPSILON, dtype=wanted)[0],
        )

    def theirs(x, residual):
        rows = (weight.double(), bias.double())
        total = x + residual
        total = total + ((x + residual).to(given).double() - total).detach()  # rounded as a sum is
        return (
            _torch_rms(x, None, rows[0]),
            _torch_rms(total, None, rows[0]),
            _torch_layer(x, None, *rows),
            _torch_layer(total, None, *rows),
        )

    with computed_by(way):
        found = ours(x, residual)
        seeds = [torch.randn_like(y) for y in found]
        of_ours = gradients(ours, [x, residual], seeds)
    assert all(y.dtype == wanted for y in found)
    assert_near(found, theirs(x.double(), residual.double()), 2)
    of_theirs = gradients(theirs, [x.double(), residual.double()], _double(seeds))
    assert [each.dtype for each in of_ours] == [given, given]
    assert_near(of_ours, of_theirs, 4)


def test_the_mask_of_a_dropout_is_drawn_as_by_torch() -> None:
    for x in (torch.randn(50, 7), torch.randn(7, 50).t(), torch.randn(3, 4, dtype=torch.bfloat16)):
        torch.manual_seed(3)
        wanted = torch.native_dropout(x, 0.3, True)[1]
        torch.manual_seed(3)
        found = DROPOUT_MASK(x, 0.3)
        assert torch.equal(found, wanted) and found.stride() == wanted.stride()
    assert not DROPOUT_MASK(x, 1.0).any() and DROPOUT_MASK(x, 0.0).all()
    assert draws(DROPOUT_MASK, (), {})
    with pytest.raises(ValueError, match=r"dropout_mask: p is 1\.5"):
        DROPOUT_MASK(x, 1.5)


def test_operators_are_what_they_declare() -> None:
    x, residual, weight, bias = (t.requires_grad_() for t in _drawn((3, 8), torch.float64) if t is not None)
    for dtype in (torch.float64, torch.bfloat16):
        x, residual, weight, bias = (t.requires_grad_() for t in _drawn((3, 8), dtype) if t is not None)
        statistics = torch.ones(3, dtype=torch.promote_types(dtype, torch.float32))
        y, of_sum, mask = x.detach(), residual.detach(), torch.rand(3, 8) < 0.5
        calls = [
            (RMS_NORM, (x, weight, EPSILON, 0.0, False)),
            (RMS_NORM, (x.t(), None, EPSILON, 0.0, False)),
            (ADD_RMS_NORM, (x, residual, weight, EPSILON, 1.0, True)),
            (LAYER_NORM, (x, weight, bias, EPSILON)),
            (ADD_LAYER_NORM, (x, residual, weight, None, EPSILON)),
            (LAYER_NORM, (x, weight, bias, EPSILON, torch.float32)),
            (ADD_RMS_NORM, (x, residual, weight, EPSILON, 1.0, True, mask, 2.0, torch.bfloat16)),
            (ADD_LAYER_NORM, (x, residual, weight, bias, EPSILON, mask, 2.0)),
            (RMS_NORM_BACKWARD, (y, y, weight.detach(), statistics, of_sum, 0.0)),
            (LAYER_NORM_BACKWARD, (y, y, weight.detach(), None, statistics, statistics, None)),
            (RMS_NORM_BACKWARD, (y.float(), y, weight.detach(), statistics, of_sum, 0.0, mask, 2.0)),
            (LAYER_NORM_BACKWARD, (y, y, weight.detach(), None, statistics, statistics, None, mask, 2.0)),
        ]
        for operator, arguments in calls:
            torch.library.opcheck(operator, arguments)


def test_gradients_are_those_of_differences() -> None:
    x, residual, weight, bias = (t.requires_grad_() for t in _drawn((2, 6), torch.float64) if t is not None)
    assert torch.autograd.gradcheck(lambda *t: _rms(*t, offset=1.0), (x, residual, weight))
    assert torch.autograd.gradcheck(_layer, (x, residual, weight, bias))
    assert torch.autograd.gradcheck(lambda x, w: _rms(x, None, w), (x, weight))
    assert torch.autograd.gradcheck(lambda x, r: _layer(x, r, None, None)[1] * 2, (x, residual))


def test_a_second_derivative_is_refused() -> None:
    x = torch.randn(2, 6, requires_grad=True)
    (of_x,) = torch.autograd.grad(_rms(x, None, None).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="rms_norm_backward has no derivative"):
        of_x.sum().backward()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: RMS_NORM(x.long(), None, EPSILON, 0.0, False), r"rms_norm: x is int64 \[3, 8\]"),
        (lambda x: RMS_NORM(x, x[0, :7], EPSILON, 0.0, False), r"rms_norm: weight is float32 \[7\].*\[8\]"),
        (lambda x: ADD_RMS_NORM(x, x[:2], None, EPSILON, 0.0, False), r"add_rms_norm: residual is float32 \[2, 8\]"),
        (lambda x: LAYER_NORM(x, x[0], x[0].long(), EPSILON), r"layer_norm: bias is int64"),
        (lambda x: ADD_LAYER_NORM(x, x.double(), None, None, EPSILON), r"residual is float64 .*not float32"),
        (lambda x: RMS_NORM_BACKWARD(x, x, None, x, None, 0.0), r"rms_norm_backward: inverse"),
        (lambda x: ADD_LAYER_NORM(x, x, None, None, EPSILON, x), r"add_layer_norm: mask is float32 .*not bool"),
        (lambda x: LAYER_NORM(x, None, None, EPSILON, torch.int64), r"layer_norm: dtype is torch.int64"),
    ],
)
def test_bad_arguments_are_named(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.randn(3, 8))
