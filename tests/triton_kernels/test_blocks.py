"""Blocks of few bits: how far numbers are off, what chance does, sums of pieces; kernels in the interpreter."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.triton_kernels.quantization.blocks.op import DEQUANTIZE_BLOCKS, QUANTIZE_BLOCKS
from graphopt.triton_kernels.quantization.blocks.reference import uniform
from tests.support.kernels import assert_near, computed_by, in_interpreter, mode

WAYS = ["reference", "triton"]
BITS = [8, 4]


def _steps(scales, block, count) -> torch.Tensor:
    return scales.repeat_interleave(block)[:count]


@given(
    count=st.integers(0, 700),
    bits=st.sampled_from(BITS),
    block=st.sampled_from([16, 64, 256]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    seed=st.one_of(st.none(), st.integers(-(2**63), 2**63 - 1)),
)
@settings(max_examples=25, deadline=None)
def test_numbers_are_within_a_step(count, bits, block, dtype, seed) -> None:
    """Half of one to nearest, one by chance; the last block has as many as are left."""
    torch.manual_seed(0)
    x = torch.randn(count).to(dtype)
    with mode("reference"):
        values, scales = QUANTIZE_BLOCKS(x, bits, block, None if seed is None else torch.tensor(seed))
        found = DEQUANTIZE_BLOCKS(values, scales, bits, count, torch.float32)
    assert values.shape == (-(-count // block), block * bits // 8) and scales.shape == values.shape[:1]
    bound = (0.50001 if seed is None else 1.00001) * _steps(scales, block, count)
    assert ((found - x.float()).abs() <= bound).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("seed", [None, 0, 2**40 + 3, -5])
def test_triton_gives_the_reference_bit_for_bit(bits, seed) -> None:
    given = None if seed is None else torch.tensor(seed)
    ties = torch.arange(-127, 129).float() / 2 + 0.25
    for x, block in (
        (torch.randn(1000), 16),
        (torch.randn(9, 500).bfloat16(), 256),
        (torch.randn(2500), 2048),
        (ties, 64),
    ):
        with mode("reference"):
            wanted = QUANTIZE_BLOCKS(x, bits, block, given)
            numbers = DEQUANTIZE_BLOCKS(*wanted, bits, x.numel(), torch.bfloat16)
        with in_interpreter():
            found = QUANTIZE_BLOCKS(x, bits, block, given)
            again = DEQUANTIZE_BLOCKS(*wanted, bits, x.numel(), torch.bfloat16)
        assert all(map(torch.equal, found, wanted)) and torch.equal(again, numbers)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bits", BITS)
def test_pieces_are_added_up(way, bits) -> None:
    tensors = [torch.randn(700) for _ in range(5)]
    with computed_by(way):
        pieces = [QUANTIZE_BLOCKS(x, bits, 64, None) for x in tensors]
        values, scales = (torch.stack(parts) for parts in zip(*pieces, strict=True))
        found = DEQUANTIZE_BLOCKS(values, scales, bits, 700, torch.float32)
        alone = [DEQUANTIZE_BLOCKS(*piece, bits, 700, torch.float64) for piece in pieces]
    assert_near([found], [sum(alone)])


def test_four_bits_lie_half_a_block_apart() -> None:
    x = torch.tensor([7.0, -7, 1, 0, 0, 0, 0, 0, 2, -1, 3, 0, 0, 0, 0, 0])
    values, scales = QUANTIZE_BLOCKS(x, 4, 16, None)
    assert scales.tolist() == [1.0]
    assert values[0, :4].tolist() == [15 | 10 << 4, 1 | 7 << 4, 9 | 11 << 4, 8 | 8 << 4]


def test_chance_is_right_on_average_and_replays() -> None:
    x = torch.rand(64) * 2 - 1
    x[0] = 1.0
    drawn = []
    for seed in range(400):
        values, scales = QUANTIZE_BLOCKS(x, 4, 64, torch.tensor(seed))
        drawn.append(DEQUANTIZE_BLOCKS(values, scales, 4, 64, torch.float32))
    again = QUANTIZE_BLOCKS(x, 4, 64, torch.tensor(399))
    assert torch.equal(values, again[0])
    step = float(scales)
    # Five standard deviations of a mean of 400 that are off by a step at most: each by half of one in the square mean.
    assert (torch.stack(drawn).mean(0) - x).abs().max() <= 5 * 0.5 * step / 400**0.5
    assert (torch.stack(drawn).var(0) > 0).sum() >= 55


def test_chance_is_even() -> None:
    """Philox4x32-10 of the counter 0 and the key 0 begins so: known answers beside Random123 (Salmon et al. 2011)."""
    first = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    found = uniform(torch.tensor(0), 1, 4)
    assert found.tolist() == [[(word >> 8) * 2.0**-24 for word in first]]
    many = uniform(torch.tensor(7), 100, 1024)
    counts = torch.histc(many, 16, 0, 1)
    expected = many.numel() / 16
    # The statistic has 15 degrees of freedom; 1 in 10,000 is above 44.3.
    assert float(((counts - expected) ** 2 / expected).sum()) < 44.3
    assert many.min() >= 0 and many.max() < 1


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("seed", [None, 3])
def test_a_block_that_is_not_finite_is_undefined(way, bits, seed) -> None:
    x = torch.randn(96)
    x[3], x[40] = torch.inf, torch.nan
    with computed_by(way):
        values, scales = QUANTIZE_BLOCKS(x, bits, 32, None if seed is None else torch.tensor(seed))
        found = DEQUANTIZE_BLOCKS(values, scales, bits, 96, torch.float32)
    assert (values[:2] == (0 if bits == 8 else 0x88)).all()
    assert found.isnan().view(3, 32).all(1).tolist() == [True, True, False] and found.isnan().sum() == 64


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bits", BITS)
def test_zeros_and_nothing_stay_that(way, bits) -> None:
    with computed_by(way):
        for count in (0, 40):
            values, scales = QUANTIZE_BLOCKS(torch.zeros(count), bits, 32, torch.tensor(1))
            assert torch.equal(DEQUANTIZE_BLOCKS(values, scales, bits, count, torch.float32), torch.zeros(count))
        none = values[None][:0], scales[None][:0]
        assert torch.equal(DEQUANTIZE_BLOCKS(*none, bits, 40, torch.float32), torch.zeros(40))
        one = QUANTIZE_BLOCKS(torch.tensor(3.5), bits, 32, None)
        assert DEQUANTIZE_BLOCKS(*one, bits, 1, torch.float32).tolist() == [3.5]


def test_operators_are_what_they_declare() -> None:
    for bits in BITS:
        x = torch.randn(5, 9)
        torch.library.opcheck(QUANTIZE_BLOCKS, (x, bits, 16, torch.tensor(4)))
        values, scales = QUANTIZE_BLOCKS(x, bits, 16, None)
        torch.library.opcheck(DEQUANTIZE_BLOCKS, (values, scales, bits, 45, torch.bfloat16))
        torch.library.opcheck(DEQUANTIZE_BLOCKS, (values[None], scales[None], bits, 45, torch.float64))
    with pytest.raises(NotImplementedError, match="graphopt::quantize_blocks has no derivative"):
        QUANTIZE_BLOCKS(x.requires_grad_(), 8, 16, None)[1].sum().backward()


V, S = QUANTIZE_BLOCKS(torch.ones(40), 8, 16, None)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: QUANTIZE_BLOCKS(V, 8, 16, None), "x is int8"),
        (lambda: QUANTIZE_BLOCKS(S, 2, 16, None), "bits is 2, not 8 or 4"),
        (lambda: QUANTIZE_BLOCKS(S, 8, 48, None), "block is 48, not a power of two from 16 to 4096"),
        (lambda: QUANTIZE_BLOCKS(S, 8, 16, torch.tensor(1.0)), r"seed is float32 \[\].*not int64 \[\]"),
        (lambda: DEQUANTIZE_BLOCKS(V, S, 4, 40, torch.float32), "values are int8"),
        (lambda: DEQUANTIZE_BLOCKS(V[0], S, 8, 40, torch.float32), r"values are int8 \[16\]"),
        (lambda: DEQUANTIZE_BLOCKS(V, S[:2], 8, 40, torch.float32), r"scales are float32 \[2\].*\[3\]"),
        (lambda: DEQUANTIZE_BLOCKS(V, S, 8, 49, torch.float32), "count is 49, which does not fit 3 blocks of 16"),
        (lambda: DEQUANTIZE_BLOCKS(V, S, 8, 32, torch.float32), "count is 32, which does not fit 3 blocks of 16"),
        (lambda: DEQUANTIZE_BLOCKS(V, S, 8, 40, torch.int8), "dtype is torch.int8, not floating"),
    ],
)
def test_bad_arguments_are_named(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()
