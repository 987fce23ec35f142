"""The interpreter of a context: what it repairs, what it sees; launches outside of it are as they were."""

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from graphopt.triton_kernels import _triton
from graphopt.triton_kernels.launch import Tile, launch, power_of_two, rows_of, tile_for


@triton.jit  # type: ignore[untyped-decorator]
def _copy(X, Y, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + at, mask=at < count, other=0.0).to(tl.float32)
    tl.store(Y + at, x.to(Y.dtype.element_ty), mask=at < count)


@triton.jit  # type: ignore[untyped-decorator]
def _cast(X, Y, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(Y + at, tl.load(X + at).to(Y.dtype.element_ty))


@triton.jit  # type: ignore[untyped-decorator]
def _multiply(X, Y, Z, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(Z + at, tl.dot(tl.load(X + at), tl.load(Y + at)))


def test_a_kernel_runs_on_the_cpu_inside_alone() -> None:
    x = torch.randn(10)
    y = torch.zeros(10)
    with _triton.interpreted():
        assert _triton.is_interpreting()
        launch(_copy, 3, x, y, 10, warps=1, BLOCK=4)
    assert torch.equal(x, y) and not _triton.is_interpreting()
    with pytest.raises((RuntimeError, ValueError)):
        launch(_copy, 3, x, y, 10, warps=1, BLOCK=4)


@pytest.mark.parametrize("does", ["reads", "writes"])
def test_what_lies_outside_of_its_tensors_is_out_of_bounds(does) -> None:
    memory = torch.zeros(20)
    short, long = memory[:9], torch.zeros(10)
    x, y = (short, long) if does == "reads" else (long, short)
    with _triton.interpreted(), pytest.raises(InterpreterError, match=f"the kernel {does} 1 of 2 elements outside"):
        launch(_copy, 3, x, y, 10, warps=1, BLOCK=4)


def test_bfloat16_is_rounded_to_nearest_even() -> None:
    x = torch.cat(
        [torch.randn(500), torch.tensor([float("inf"), float("nan"), 1e-40, 3.4e38, 1 + 2**-8, 1 + 3 * 2**-8])]
    )
    y = torch.zeros(len(x), dtype=torch.bfloat16)
    with _triton.interpreted():
        launch(_copy, 1, x, y, len(x), warps=1, BLOCK=512)
    torch.testing.assert_close(y, x.bfloat16(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_float8_is_rounded_to_nearest_even(dtype) -> None:
    x = torch.cat([torch.randn(500), torch.tensor([448.0, 17.0, 19.0, 2.0**-10, 3 * 2.0**-10, -1e-9])])
    y = torch.zeros(len(x), dtype=dtype)
    with _triton.interpreted():
        launch(_copy, 1, x, y, len(x), warps=1, BLOCK=512)
    assert torch.equal(y.float(), x.to(dtype).float())


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2], ids=str
)
def test_products_of_matrices_are_of_numbers(dtype) -> None:
    """Rather than of the bits that the interpreter holds for some; these are exact in all formats."""
    x, y = (torch.randint(-3, 4, (16, 16)).to(dtype) for _ in range(2))
    z = torch.zeros(16, 16)
    with _triton.interpreted():
        launch(_multiply, 1, x, y, z, warps=1, SIZE=16)
    assert torch.equal(z, x.float() @ y.float())


def test_integers_become_bfloat16() -> None:
    x, y = torch.arange(-128, 128), torch.zeros(256, dtype=torch.bfloat16)
    with _triton.interpreted():
        launch(_cast, 1, x, y, warps=1, BLOCK=256)
    assert torch.equal(y, x.bfloat16())


def test_no_program_is_no_launch() -> None:
    launch(_copy, 0, torch.zeros(0), torch.zeros(0), 0, warps=1, BLOCK=4)


def test_the_first_tile_that_is_wide_enough_is_taken() -> None:
    tiles = (Tile(32, 4, 1), Tile(64, 2, 1))
    assert [tile_for(tiles, width) for width in (1, 32, 33, 64, 65)] == [tiles[0], tiles[0], tiles[1], tiles[1], None]
    assert [power_of_two(size) for size in (1, 2, 3, 64, 65)] == [1, 2, 4, 64, 128]


def test_rows_are_copied_only_where_they_must_be() -> None:
    x = torch.randn(4, 6, 8)
    assert rows_of(x).data_ptr() == x.data_ptr() and rows_of(x).shape == (24, 8)
    assert rows_of(x[0, :, 2:5]).stride() == (8, 1)
    assert rows_of(x.transpose(0, 2)).stride() == (4, 1)
    assert rows_of(x[0, 0]).shape == (1, 8) and rows_of(torch.zeros(0, 3, 5)).shape == (0, 5)
