"""Products by group on a GPU; functions have the arguments and results of those in `reference`.

Tiles of one group lie side by side in the grid, so that programs which run together read the same matrices, and no tile
has rows of two groups. How many tiles a group has is known on the device alone: the grid has as many programs as there
can be, each finds its tile from the ends of all groups, and what is left over ends at once.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphopt.triton_kernels import _triton
from graphopt.triton_kernels.experts.products import torchs
from graphopt.triton_kernels.launch import launch, power_of_two, rows_of

_TOGETHER = 8  # tiles below one another that programs take before they go on to the right
_CLEARED = 2048  # elements that a program makes zero


class _Tile(NamedTuple):
    """Rows and columns of the result that a program gives, and how much it reads for them at once, in stages."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


# By the mean number of rows of a group, at most: what is read for a tile of few rows is mostly matrix.
_HALF = ((16, _Tile(16, 128, 128, 4, 3)), (32, _Tile(32, 128, 64, 4, 4)), (64, _Tile(64, 128, 64, 4, 4)))
_HALF_LARGE = _Tile(128, 256, 64, 8, 3)
_TF32 = _Tile(128, 128, 32, 8, 3)
_EXACT = _Tile(64, 64, 32, 4, 3)  # float32 has no tensor cores
_OUTER_HALF = _Tile(128, 128, 64, 8, 3)
# tf32 is multiplied on sm_90 from rows that lie turned: in several stages they would be copied 4 bytes at a time.
_OUTER_TF32 = _Tile(128, 128, 32, 8, 1)


@triton.jit
def _turned(tile, down, across, TOGETHER: tl.constexpr):
    """Where a tile lies: some below one another, then those to their right."""
    first = tile // (TOGETHER * across) * TOGETHER
    height = tl.minimum(down - first, TOGETHER)
    within = tile % (TOGETHER * across)
    return first + within % height, within // height


@triton.jit
def _mm(
    ROWS, MATRICES, ENDS, RESULT, row_stride, matrix_stride, inner_stride, outer_stride, count, depth, width, groups,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUPS: tl.constexpr, EVEN: tl.constexpr,
    TOGETHER: tl.constexpr, PRECISION: tl.constexpr, WIDENS: tl.constexpr,
):  # fmt: skip
    # Rows past the last end are one more group, which has no matrix.
    index = tl.arange(0, GROUPS)
    ends = tl.load(ENDS + index, mask=index < groups, other=0)
    ends = tl.where(index < groups, ends, count)
    starts = tl.load(ENDS + index - 1, mask=(index > 0) & (index <= groups), other=0)
    starts = tl.where(index <= groups, starts, count)
    across = tl.cdiv(width, N)
    tiles = tl.cdiv(ends - starts, M) * across
    behind = tl.cumsum(tiles, axis=0)
    tile = tl.program_id(0)
    group = tl.sum((behind <= tile).to(tl.int32), axis=0)
    if group > groups:
        return
    is_own = index == group
    start = tl.sum(tl.where(is_own, starts, 0), axis=0)
    end = tl.sum(tl.where(is_own, ends, 0), axis=0)
    tile -= tl.sum(tl.where(is_own, behind - tiles, 0), axis=0)
    m, n = _turned(tile, tl.cdiv(end - start, M), across, TOGETHER)
    row = start + m * M + tl.arange(0, M)
    column = n * N + tl.arange(0, N)
    inner = tl.arange(0, K)
    is_row, is_column = (row < end)[:, None], (column < width)[None, :]
    rows = ROWS + row.to(tl.int64)[:, None] * row_stride + inner[None, :]
    matrix = MATRICES + group.to(tl.int64) * matrix_stride
    matrix += inner[:, None].to(tl.int64) * inner_stride + column[None, :].to(tl.int64) * outer_stride
    total = tl.zeros((M, N), dtype=tl.float32)
    for first in range(0, tl.where(group < groups, depth, 0), K):
        if EVEN:
            a = tl.load(rows, mask=is_row, other=0.0)
            b = tl.load(matrix, mask=is_column, other=0.0)
        else:
            is_inner = first + inner < depth
            a = tl.load(rows, mask=is_row & is_inner[None, :], other=0.0)
            b = tl.load(matrix, mask=is_column & is_inner[:, None], other=0.0)
        if WIDENS:
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision=PRECISION)
        rows += K
        matrix += K * inner_stride
    result = RESULT + row.to(tl.int64)[:, None] * width + column[None, :]
    tl.store(result, total.to(RESULT.dtype.element_ty), mask=is_row & is_column)


@triton.jit
def _outer(
    ROWS, OTHERS, ENDS, RESULT, row_stride, other_stride, depth, width,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, TOGETHER: tl.constexpr, PRECISION: tl.constexpr,
    WIDENS: tl.constexpr,
):  # fmt: skip
    down, across = tl.cdiv(depth, M), tl.cdiv(width, N)
    group = tl.program_id(0) // (down * across)
    m, n = _turned(tl.program_id(0) % (down * across), down, across, TOGETHER)
    start = tl.load(ENDS + group - 1, mask=group > 0, other=0)
    end = tl.load(ENDS + group)
    inner, column = m * M + tl.arange(0, M), n * N + tl.arange(0, N)
    is_inner, is_column = (inner < depth)[None, :], (column < width)[None, :]
    row = start + tl.arange(0, K)
    rows = ROWS + row.to(tl.int64)[:, None] * row_stride + inner[None, :]
    others = OTHERS + row.to(tl.int64)[:, None] * other_stride + column[None, :]
    total = tl.zeros((M, N), dtype=tl.float32)
    for first in range(start, end, K):
        is_row = first + tl.arange(0, K) < end
        a = tl.load(rows, mask=is_inner & is_row[:, None], other=0.0)
        b = tl.load(others, mask=is_column & is_row[:, None], other=0.0)
        if WIDENS:
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(tl.trans(a), b, total, input_precision=PRECISION)
        rows += K * row_stride
        others += K * other_stride
    result = RESULT + group.to(tl.int64) * depth * width
    result += inner[:, None].to(tl.int64) * width + column[None, :]
    tl.store(result, total.to(RESULT.dtype.element_ty), mask=(inner < depth)[:, None] & is_column)


@triton.jit
def _clear(RESULT, ENDS, size, width, groups, BLOCK: tl.constexpr):
    """Zeros from the last end on."""
    end = tl.load(ENDS + groups - 1).to(tl.int64) * width
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    zeros = tl.zeros((BLOCK,), dtype=RESULT.dtype.element_ty)
    tl.store(RESULT + at, zeros, mask=(at >= end) & (at < size))


def grouped_mm(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    given = rows_of(rows)
    count, depth = given.shape
    groups, _, width = matrices.shape
    if torchs.is_fast(rows) and torchs.takes(given, matrices):
        result = torchs.product(given, matrices, ends)
        launch(_clear, triton.cdiv(count * width, _CLEARED), result, ends.contiguous(), count * width,
               width, groups, warps=4, BLOCK=_CLEARED)  # fmt: skip
        return result
    if 1 not in matrices.stride()[1:]:
        matrices = matrices.contiguous()
    result = torch.empty(count, width, dtype=rows.dtype, device=rows.device)
    tile = _tile_of(rows, count // groups)
    programs = (count // tile.rows + min(groups + 1, count)) * triton.cdiv(width, tile.columns)
    launch(_mm, programs, given, matrices, ends.contiguous(), result, given.stride(0), *matrices.stride(), count, depth,
           width, groups, warps=tile.warps, num_stages=tile.stages, M=tile.rows, N=tile.columns, K=tile.depth,
           GROUPS=power_of_two(groups + 1), EVEN=depth % tile.depth == 0, TOGETHER=_TOGETHER,
           **_precision(rows))  # fmt: skip
    return result


def grouped_outer(rows: Tensor, others: Tensor, ends: Tensor) -> Tensor:
    given, beside = rows_of(rows), rows_of(others)
    if torchs.is_fast(rows) and torchs.takes(given.t(), beside):
        return torchs.product(given.t(), beside, ends)
    depth, width, groups = given.shape[1], beside.shape[1], len(ends)
    result = torch.empty(groups, depth, width, dtype=rows.dtype, device=rows.device)
    tile = _OUTER_HALF if rows.dtype.itemsize == 2 else _OUTER_TF32 if _allows_tf32() else _EXACT
    programs = groups * triton.cdiv(depth, tile.rows) * triton.cdiv(width, tile.columns)
    launch(_outer, programs, given, beside, ends.contiguous(), result, given.stride(0), beside.stride(0), depth, width,
           warps=tile.warps, num_stages=tile.stages, M=tile.rows, N=tile.columns, K=tile.depth, TOGETHER=_TOGETHER,
           **_precision(rows))  # fmt: skip
    return result


def _tile_of(rows: Tensor, mean: int) -> _Tile:
    """By dtype, and by how many rows groups have."""
    if rows.dtype.itemsize == 4:
        return _TF32 if _allows_tf32() else _EXACT
    return next((tile for most, tile in _HALF if mean <= most), _HALF_LARGE)


def _precision(rows: Tensor) -> dict[str, str | bool]:
    """How float32 is multiplied. The interpreter multiplies the bits of bfloat16: it is given their values."""
    return {"PRECISION": "tf32" if _allows_tf32() else "ieee", "WIDENS": _triton.is_interpreting()}


def _allows_tf32() -> bool:
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")
