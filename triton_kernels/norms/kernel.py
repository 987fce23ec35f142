"""Norms of rows on a GPU; functions have the arguments and results of those in `reference`.

A row that fits is held in registers: it is read once. Wider ones are streamed in blocks, once for the statistics and
once more, from the cache where it is large enough, for the result. In backward, the gradients of weight and bias are
sums over rows: each program keeps those of its rows in registers and leaves them in a row of `partial`, which is summed
afterwards in the same order each time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphopt.triton_kernels.launch import Tile, launch, multiprocessors, power_of_two, rows_of, tile_for
from graphopt.triton_kernels.norms.reference import Norm

# Forward, a thread has 16 elements of each tensor (32 of the widest). Backward, of up to six tensors, it has 16 bytes
# (32 of the widest), where widths are of two bytes an element: with more, some variants spill (resources.json), and of
# the widest those with a mask.
_FORWARD = (
    Tile(32, 64, 4), Tile(64, 32, 4), Tile(128, 16, 4), Tile(256, 8, 4), Tile(512, 4, 4), Tile(1024, 2, 4),
    Tile(2048, 1, 4), Tile(4096, 1, 8), Tile(8192, 1, 16), Tile(16384, 1, 16),
)  # fmt: skip
_BACKWARD = (
    Tile(32, 32, 4), Tile(64, 16, 4), Tile(128, 8, 4), Tile(256, 4, 4), Tile(512, 2, 4), Tile(1024, 1, 4),
    Tile(2048, 1, 8), Tile(4096, 1, 16), Tile(8192, 1, 16),
)  # fmt: skip
_STREAMED = Tile(4096, 1, 8)  # width: of a block
_ROWS_OF_PARTIAL = 64  # at least so many rows are summed by a program, of what is streamed
_THREADS = 1024  # of a multiprocessor, in programs that stay


@triton.jit
def _weighted(normalized, columns, inside, WEIGHT, BIAS, offset, like, ROUND_FIRST: tl.constexpr):
    if ROUND_FIRST:
        normalized = normalized.to(like).to(tl.float32)
    if WEIGHT is not None:
        normalized = normalized * (offset + tl.load(WEIGHT + columns, mask=inside, other=0.0).to(tl.float32))
    if BIAS is not None:
        normalized = normalized + tl.load(BIAS + columns, mask=inside, other=0.0).to(tl.float32)
    return normalized


@triton.jit
def _held_forward(
    X, RESIDUAL, MASK, WEIGHT, BIAS, Y, SUM, MEAN, INVERSE, x_stride, residual_stride, rows, width, epsilon, offset,
    scale, CENTERED: tl.constexpr, ROUND_FIRST: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)[None, :]
    is_row = row < rows
    inside = is_row[:, None] & (columns < width)
    at = row[:, None] * width + columns
    x = tl.load(X + row[:, None] * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if MASK is not None:
        x *= tl.load(MASK + at, mask=inside, other=0).to(tl.float32) * scale
    if RESIDUAL is not None:
        x += tl.load(RESIDUAL + row[:, None] * residual_stride + columns, mask=inside, other=0.0).to(tl.float32)
        total = x.to(SUM.dtype.element_ty)
        tl.store(SUM + at, total, mask=inside)
        x = total.to(tl.float32)
    if CENTERED:
        mean = tl.sum(x, axis=1) / width
        tl.store(MEAN + row, mean, mask=is_row)
        x = tl.where(inside, x - mean[:, None], 0.0)
    inverse = tl.rsqrt(tl.sum(x * x, axis=1) / width + epsilon)
    tl.store(INVERSE + row, inverse, mask=is_row)
    like = X.dtype.element_ty
    y = _weighted(x * inverse[:, None], columns, columns < width, WEIGHT, BIAS, offset, like, ROUND_FIRST)
    tl.store(Y + at, y.to(Y.dtype.element_ty), mask=inside)


@triton.jit
def _streamed_forward(
    X, RESIDUAL, MASK, WEIGHT, BIAS, Y, SUM, MEAN, INVERSE, x_stride, residual_stride, width, epsilon, offset, scale,
    CENTERED: tl.constexpr, ROUND_FIRST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    mean = 0.0
    squares = 0.0  # of distances from the mean, or from zero
    for first in range(0, width, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        inside = columns < width
        x = tl.load(X + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
        if MASK is not None:
            x *= tl.load(MASK + row * width + columns, mask=inside, other=0).to(tl.float32) * scale
        if RESIDUAL is not None:
            x += tl.load(RESIDUAL + row * residual_stride + columns, mask=inside, other=0.0).to(tl.float32)
            total = x.to(SUM.dtype.element_ty)
            tl.store(SUM + row * width + columns, total, mask=inside)
            x = total.to(tl.float32)
        if CENTERED:  # merged as in Chan, Golub and LeVeque 1983
            count = tl.minimum(width - first, BLOCK)
            mean_here = tl.sum(x, axis=0) / count
            x = tl.where(inside, x - mean_here, 0.0)
            apart = mean_here - mean
            share = count.to(tl.float32) / (first + count)
            mean += apart * share
            squares += apart * apart * share * first
        squares += tl.sum(x * x, axis=0)
    inverse = tl.rsqrt(squares / width + epsilon)
    if CENTERED:
        tl.store(MEAN + row, mean)
    tl.store(INVERSE + row, inverse)
    tl.debug_barrier()  # what other threads have written of the sum is read below
    for first in range(0, width, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        inside = columns < width
        if RESIDUAL is not None:
            x = tl.load(SUM + row * width + columns, mask=inside, other=0.0).to(tl.float32)
        else:
            x = tl.load(X + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
        like = X.dtype.element_ty
        y = _weighted((x - mean) * inverse, columns, inside, WEIGHT, BIAS, offset, like, ROUND_FIRST)
        tl.store(Y + row * width + columns, y.to(Y.dtype.element_ty), mask=inside)


@triton.jit
def _held_backward(
    GRADIENT, X, MASK, WEIGHT, MEAN, INVERSE, OF_SUM, OF_X, OF_DROPPED, OF_WEIGHT, OF_BIAS, gradient_stride, x_stride,
    of_sum_stride, rows, width, offset, scale, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, BLOCK)[None, :]
    if WEIGHT is not None:
        weight = offset + tl.load(WEIGHT + columns, mask=columns < width, other=0.0).to(tl.float32)
    of_weight = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    of_bias = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
        is_row = row < rows
        inside = is_row[:, None] & (columns < width)
        inverse = tl.load(INVERSE + row, mask=is_row, other=0.0)[:, None]
        x = tl.load(X + row[:, None] * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
        gradient = tl.load(GRADIENT + row[:, None] * gradient_stride + columns, mask=inside, other=0.0).to(tl.float32)
        if MEAN is not None:
            x = tl.where(inside, x - tl.load(MEAN + row, mask=is_row, other=0.0)[:, None], 0.0)
        normalized = x * inverse
        if OF_WEIGHT is not None:
            of_weight += gradient * normalized
        if OF_BIAS is not None:
            of_bias += gradient
        if WEIGHT is not None:
            gradient = gradient * weight
        of_x = gradient - normalized * (tl.sum(gradient * normalized, axis=1) / width)[:, None]
        if MEAN is not None:
            of_x -= (tl.sum(gradient, axis=1) / width)[:, None]
        of_x *= inverse
        if OF_SUM is not None:
            of_x += tl.load(OF_SUM + row[:, None] * of_sum_stride + columns, mask=inside, other=0.0).to(tl.float32)
        at = row[:, None] * width + columns
        tl.store(OF_X + at, of_x.to(OF_X.dtype.element_ty), mask=inside)
        if MASK is not None:
            of_x *= tl.load(MASK + at, mask=inside, other=0).to(tl.float32) * scale
            tl.store(OF_DROPPED + at, of_x.to(OF_X.dtype.element_ty), mask=inside)
    column = tl.arange(0, BLOCK)
    partial = tl.program_id(0).to(tl.int64) * width + column
    if OF_WEIGHT is not None:
        tl.store(OF_WEIGHT + partial, tl.sum(of_weight, axis=0), mask=column < width)
    if OF_BIAS is not None:
        tl.store(OF_BIAS + partial, tl.sum(of_bias, axis=0), mask=column < width)


@triton.jit
def _streamed_backward(
    GRADIENT, X, MASK, WEIGHT, MEAN, INVERSE, OF_SUM, OF_X, OF_DROPPED, gradient_stride, x_stride, of_sum_stride,
    width, offset, scale, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    inverse = tl.load(INVERSE + row)
    mean = 0.0
    if MEAN is not None:
        mean = tl.load(MEAN + row)
    along = tl.zeros((BLOCK,), dtype=tl.float32)  # the gradient with the normalized row
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, width, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        inside = columns < width
        x = tl.load(X + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
        gradient = tl.load(GRADIENT + row * gradient_stride + columns, mask=inside, other=0.0).to(tl.float32)
        if WEIGHT is not None:
            gradient *= offset + tl.load(WEIGHT + columns, mask=inside, other=0.0).to(tl.float32)
        along += gradient * (x - mean) * inverse
        total += gradient
    along_mean = tl.sum(along, axis=0) / width
    total_mean = 0.0
    if MEAN is not None:
        total_mean = tl.sum(total, axis=0) / width
    for first in range(0, width, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        inside = columns < width
        x = tl.load(X + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
        gradient = tl.load(GRADIENT + row * gradient_stride + columns, mask=inside, other=0.0).to(tl.float32)
        if WEIGHT is not None:
            gradient *= offset + tl.load(WEIGHT + columns, mask=inside, other=0.0).to(tl.float32)
        of_x = (gradient - total_mean - (x - mean) * inverse * along_mean) * inverse
        if OF_SUM is not None:
            of_x += tl.load(OF_SUM + row * of_sum_stride + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(OF_X + row * width + columns, of_x.to(OF_X.dtype.element_ty), mask=inside)
        if MASK is not None:
            of_x *= tl.load(MASK + row * width + columns, mask=inside, other=0).to(tl.float32) * scale
            tl.store(OF_DROPPED + row * width + columns, of_x.to(OF_X.dtype.element_ty), mask=inside)


@triton.jit
def _columns_backward(
    GRADIENT, X, MEAN, INVERSE, OF_WEIGHT, OF_BIAS, gradient_stride, x_stride, rows, width, rows_each,
    BLOCK: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(width, BLOCK)
    part = tl.program_id(0) // blocks
    columns = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    of_weight = tl.zeros((BLOCK,), dtype=tl.float32)
    of_bias = tl.zeros((BLOCK,), dtype=tl.float32)
    for each in range(part * rows_each, tl.minimum((part + 1) * rows_each, rows)):
        row = each + tl.zeros((1,), dtype=tl.int64)
        gradient = tl.load(GRADIENT + row * gradient_stride + columns, mask=inside, other=0.0).to(tl.float32)
        of_bias += gradient
        if OF_WEIGHT is not None:
            x = tl.load(X + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
            if MEAN is not None:
                x -= tl.load(MEAN + row)
            of_weight += gradient * x * tl.load(INVERSE + row)
    at = part.to(tl.int64) * width + columns
    if OF_WEIGHT is not None:
        tl.store(OF_WEIGHT + at, of_weight, mask=inside)
    if OF_BIAS is not None:
        tl.store(OF_BIAS + at, of_bias, mask=inside)


def forward(
    x: Tensor, residual: Tensor | None, mask: Tensor | None, weight: Tensor | None, bias: Tensor | None, norm: Norm
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = rows_of(x)
    others = None if residual is None else rows_of(residual)
    y = torch.empty(x.shape, dtype=norm.dtype or x.dtype, device=x.device)
    total = torch.empty(x.shape if residual is not None else 0, dtype=x.dtype, device=x.device)
    mean, inverse = (
        torch.empty(x.shape[:-1] if wanted else 0, dtype=torch.float32, device=x.device)
        for wanted in (norm.is_centered, True)
    )
    pointers = (others, _bytes(mask), weight, bias, y, total, mean, inverse)
    strides = (rows.stride(0), 0 if others is None else others.stride(0))
    numbers = (norm.epsilon, norm.offset, norm.scale)
    constants = {"CENTERED": norm.is_centered, "ROUND_FIRST": norm.round_first}
    count, width = rows.shape
    tile = tile_for(_FORWARD, width)
    if tile is None:
        launch(_streamed_forward, count, rows, *pointers, *strides, width, *numbers,
               warps=_STREAMED.warps, BLOCK=_STREAMED.width, **constants)  # fmt: skip
    else:
        launch(_held_forward, triton.cdiv(count, tile.rows), rows, *pointers, *strides, count, width, *numbers,
               warps=tile.warps, ROWS=tile.rows, BLOCK=power_of_two(width), **constants)  # fmt: skip
    return y, total, mean, inverse


def backward(
    x: Tensor,
    gradient: Tensor,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    inverse: Tensor,
    of_sum: Tensor | None,
    norm: Norm,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, gradients = rows_of(x), rows_of(gradient)
    others = None if of_sum is None else rows_of(of_sum)
    strides = (gradients.stride(0), rows.stride(0), 0 if others is None else others.stride(0))
    count, width = rows.shape
    of_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dropped = torch.empty(x.shape if mask is not None else 0, dtype=x.dtype, device=x.device)
    pointers = (gradients, rows, _bytes(mask), weight, mean, inverse, others, of_x, dropped)
    numbers = (norm.offset, norm.scale)
    tiles = _BACKWARD if mask is None else _BACKWARD[:-1]
    tile = tile_for(tiles, width * max(x.element_size(), gradient.element_size()) // 2)
    blocks = triton.cdiv(width, _STREAMED.width)
    if tile is None:
        parts = triton.cdiv(count, max(_ROWS_OF_PARTIAL, triton.cdiv(count * blocks, 8 * multiprocessors(x.device))))
    else:
        staying = multiprocessors(x.device) * max(1, _THREADS // (32 * tile.warps))
        parts = min(staying, triton.cdiv(count, tile.rows))
    of_weight, of_bias = (
        None if like is None else torch.empty(parts, width, dtype=torch.float32, device=x.device)
        for like in (weight, bias)
    )
    if tile is None:
        launch(_streamed_backward, count, *pointers, *strides, width, *numbers,
               warps=_STREAMED.warps, BLOCK=_STREAMED.width)  # fmt: skip
        if weight is not None or bias is not None:
            launch(_columns_backward, parts * blocks, gradients, rows, mean, inverse, of_weight, of_bias, *strides[:2],
                   count, width, triton.cdiv(count, max(1, parts)),
                   warps=_STREAMED.warps, BLOCK=_STREAMED.width)  # fmt: skip
    else:
        launch(_held_backward, parts, *pointers, of_weight, of_bias, *strides, count, width, *numbers,
               warps=tile.warps, ROWS=tile.rows, BLOCK=power_of_two(width))  # fmt: skip
    return of_x, dropped, _summed(of_weight, weight, x), _summed(of_bias, bias, x)


def _bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous().view(torch.uint8)


def _summed(partial: Tensor | None, like: Tensor | None, x: Tensor) -> Tensor:
    if partial is None or like is None:
        return torch.empty(0, dtype=torch.float32, device=x.device)
    return partial.sum(0).to(like.dtype)
