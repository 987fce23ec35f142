"""Rotary embedding beside complex multiplication in float64; its Triton kernel in the interpreter."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.triton_kernels.rotary.op import ROTARY
from tests.support.kernels import WAYS, assert_near, computed_by, gradients, mode


def _turned(x, angles, interleaved, inverse=False) -> torch.Tensor:
    """Pairs as complex numbers, multiplied by those of the unit circle."""
    half = angles.shape[-1]
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    pairs = turned.unflatten(-1, (half, 2)) if interleaved else turned.unflatten(-1, (2, half)).transpose(-1, -2)
    turn = torch.polar(torch.ones_like(angles), -angles if inverse else angles).unsqueeze(1)
    result = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
    return torch.cat([(result if interleaved else result.transpose(-1, -2)).flatten(-2), rest], -1)


def _check(q, k, angles, interleaved, inverse=False) -> None:
    def ours(q, k):
        return ROTARY(q, k, angles.cos().to(q.dtype), angles.sin().to(q.dtype), interleaved, inverse)

    def theirs(q, k):
        cos_sin = torch.view_as_real(torch.polar(torch.ones_like(angles), angles)).to(dtype).double()
        rounded = torch.atan2(cos_sin[..., 1], cos_sin[..., 0])
        length = cos_sin.norm(dim=-1)
        scale = torch.cat([length, length], -1) if not interleaved else length.repeat_interleave(2, -1)
        scale = torch.cat([scale, torch.ones(*scale.shape[:-1], q.shape[-1] - scale.shape[-1])], -1).unsqueeze(1)
        return tuple(_turned(x, rounded, interleaved, inverse) * scale for x in (q, k))

    dtype = q.dtype
    found, wanted = ours(q, k), theirs(q.double(), k.double())
    assert_near(found, wanted)
    assert [x.stride() for x in found] == [torch.empty_like(x).stride() for x in (q, k)]
    seeds = [torch.randn_like(x) for x in found]
    doubles = [seed.double() for seed in seeds]
    assert_near(gradients(ours, (q, k), seeds), gradients(theirs, (q.double(), k.double()), doubles))


@given(
    sizes=st.tuples(*[st.integers(1, 3)] * 4),
    half=st.integers(1, 5),
    rest=st.integers(0, 3),
    one_batch=st.booleans(),
    flags=st.tuples(st.booleans(), st.booleans()),
)
@settings(max_examples=20, deadline=None)
def test_the_reference_multiplies_complex_numbers(sizes, half, rest, one_batch, flags) -> None:
    torch.manual_seed(0)
    batch, heads, key_heads, positions = sizes
    q, k = (torch.randn(batch, h, positions, 2 * half + rest).double() for h in (heads, key_heads))
    angles = 6 * torch.rand(1 if one_batch else batch, positions, half).double()
    with mode("reference"):
        _check(q, k, angles, *flags)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", ["triton", "cuda"])
def test_the_kernel_multiplies_complex_numbers(interleaved, way, dtype) -> None:
    """Heads before positions and behind them; few heads and more than a tile has; a part of the width turned."""
    angles = 6 * torch.rand(2, 3, 6).double()
    with computed_by(way):
        q, k = (torch.randn(2, heads, 3, 12).to(dtype) for heads in (5, 2))
        _check(q, k, angles, interleaved)
        q, k = (torch.randn(2, 3, heads, 17).to(dtype).transpose(1, 2) for heads in (3, 1))
        _check(q, k, angles[:1], interleaved, inverse=True)
        q, k = (torch.randn(1, heads, 2, 512).to(dtype) for heads in (6, 1))
        _check(q, k, 6 * torch.rand(1, 2, 256).double(), interleaved)
        turned = torch.randn(1, 2, 12, 3).to(dtype).transpose(2, 3)
        _check(turned, turned, angles[:1], interleaved)


@pytest.mark.parametrize("way", WAYS)
def test_no_position_gives_none(way) -> None:
    q, angle = torch.randn(2, 3, 0, 8), torch.randn(1, 0, 4)
    with computed_by(way):
        assert ROTARY(q, q, angle, angle, False, False)[0].shape == q.shape


def test_the_inverse_undoes_and_is_the_derivative() -> None:
    q, k = (torch.randn(2, heads, 3, 10, dtype=torch.float64, requires_grad=True) for heads in (4, 2))
    angles = torch.randn(1, 3, 4).double()
    turn = (angles.cos(), angles.sin())
    for interleaved, *apart in ([False], [True], [True, True]):
        there = ROTARY(q, k, *turn, interleaved, False, *apart)
        assert_near(ROTARY(*there, *turn, interleaved, True, *apart), (q, k))
        torch.library.opcheck(ROTARY, (q, k, *turn, interleaved, False, *apart))

        def turned(*tensors, options=(interleaved, False, *apart)):
            return ROTARY(*tensors, *turn, *options)

        assert torch.autograd.gradcheck(turned, (q, k))
        assert torch.autograd.gradgradcheck(turned, (q, k))
    other = q.transpose(1, 2)
    torch.library.opcheck(ROTARY, (other, other, *(t[:, :1].expand(1, 4, 4) for t in turn), True, True))


@pytest.mark.parametrize(
    ("way", "dtype"), [("reference", torch.float64), ("triton", torch.bfloat16), ("cuda", torch.float32)], ids=str
)
def test_pairs_side_by_side_may_come_out_half_a_width_apart(way, dtype) -> None:
    """As in DeepSeek; what is not turned stays behind them."""
    q, k = torch.randn(2, 3, 4, 14).to(dtype), torch.randn(2, 1, 4, 14).to(dtype)
    turn = (torch.rand(1, 4, 6).to(dtype), torch.rand(1, 4, 6).to(dtype))
    order = [*range(0, 12, 2), *range(1, 12, 2), 12, 13]
    with computed_by(way):
        beside = ROTARY(q, k, *turn, True, False)
        apart = ROTARY(q, k, *turn, True, False, True)
        back = ROTARY(*apart, *turn, True, True, True)
        assert_near(apart, [x[..., order] for x in beside])
        assert_near(back, ROTARY(*beside, *turn, True, True))
    with pytest.raises(ValueError, match="rotary: apart is True, which goes with interleaved"):
        ROTARY(q, k, *turn, False, False, True)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda q, t: ROTARY(q[0], q[0], t, t, False, False), r"q is float32 \[4, 3, 10\].*at least 4 dimensions"),
        (lambda q, t: ROTARY(q, q[..., :8], t, t, False, False), r"k is float32 \[2, 4, 3, 8\]"),
        (lambda q, t: ROTARY(q, q, t[:, :2], t, False, False), r"cos is float32 \[1, 2, 4\].*\[2 or 1, 3, at most 5\]"),
        (lambda q, t: ROTARY(q, q, t, t[..., :2], False, False), r"sin is float32 \[1, 3, 2\].*but cos"),
        (lambda q, t: ROTARY(q, q, t, t.int(), False, False), "sin is int32"),
        (lambda q, t: ROTARY(q, q, t.requires_grad_(), t, False, False), "cos and sin are constants"),
    ],
)
def test_bad_arguments_are_named(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.randn(2, 4, 3, 10, requires_grad=True), torch.randn(1, 3, 4))
