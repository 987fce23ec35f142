"""Softmax of scaled and masked scores on a GPU; functions have the arguments and results of those in `reference`.

Rows up to a width are held, and read once. Wider ones are read twice, the second time from the cache; each lane then
keeps the largest of its own elements and the sum of exponentials below it (Milakov and Gimelshein 2018,
arXiv:1805.02867). What is behind in a causal row is not read.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphopt.triton_kernels.launch import Tile, launch, power_of_two, rows_of, tile_for

# For each width the rows that make up 16 elements a thread, or one with up to 32.
_HELD = (
    Tile(32, 64, 4), Tile(64, 32, 4), Tile(128, 16, 4), Tile(256, 8, 4), Tile(512, 4, 4), Tile(1024, 2, 4),
    Tile(2048, 1, 4), Tile(4096, 1, 8), Tile(8192, 1, 16), Tile(16384, 1, 16),
)  # fmt: skip
_HELD_FORWARD = (*_HELD, Tile(32768, 1, 32))  # backward has two tensors
_STREAMED = Tile(4096, 1, 8)  # width: of a block
_LEAST_DIMENSIONS = 4


@triton.jit
def _scores(
    X, MASK, row, inside, columns, x_stride, heads, queries, width,
    mask_batch, mask_head, mask_query, mask_column, scale, CAUSAL: tl.constexpr, BOOLEAN: tl.constexpr,
):  # fmt: skip
    """Scaled and masked elements of rows, -inf where none is; row and columns are of a shape or broadcast."""
    query = row % queries
    if CAUSAL:  # as much as is read at once is read or not
        last = query + width - queries
        inside = inside & (columns // 16 * 16 <= last)
    x = tl.load(X + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32) * scale
    if MASK is not None:
        of_row = row // (queries * heads) * mask_batch + row // queries % heads * mask_head + query * mask_query
        mask = tl.load(MASK + of_row + columns * mask_column, mask=inside, other=0)
        if BOOLEAN:
            inside = inside & (mask != 0)
        else:
            x += mask.to(tl.float32)
    if CAUSAL:
        inside = inside & (columns <= last)
    return tl.where(inside, x, float("-inf"))


@triton.jit
def _held_forward(
    X, MASK, Y, x_stride, rows, heads, queries, width, mask_batch, mask_head, mask_query, mask_column, scale,
    CAUSAL: tl.constexpr, BOOLEAN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (columns < width)
    x = _scores(X, MASK, row, inside, columns, x_stride, heads, queries, width, mask_batch, mask_head, mask_query,
                mask_column, scale, CAUSAL, BOOLEAN)  # fmt: skip
    largest = tl.max(x, axis=1)[:, None]
    weights = tl.exp(x - tl.where(largest == float("-inf"), 0.0, largest))
    total = tl.sum(weights, axis=1)[:, None]
    y = weights * (1.0 / tl.where(total == 0.0, 1.0, total))
    tl.store(Y + row * width + columns, y.to(Y.dtype.element_ty), mask=inside)


@triton.jit
def _streamed_forward(
    X, MASK, Y, x_stride, heads, queries, width, mask_batch, mask_head, mask_query, mask_column, scale,
    CAUSAL: tl.constexpr, BOOLEAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    counted = tl.minimum(row % queries + width - queries + 1, width) if CAUSAL else width
    largest = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, counted, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        x = _scores(X, MASK, row, columns < width, columns, x_stride, heads, queries, width, mask_batch, mask_head,
                    mask_query, mask_column, scale, CAUSAL, BOOLEAN)  # fmt: skip
        now = tl.maximum(largest, x)
        base = tl.where(now == float("-inf"), 0.0, now)
        sums = sums * tl.exp(largest - base) + tl.exp(x - base)
        largest = now
    top = tl.max(largest, axis=0)
    base = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(sums * tl.exp(largest - base), axis=0)
    inverse = 1.0 / tl.where(total == 0.0, 1.0, total)
    for first in range(0, width, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        x = _scores(X, MASK, row, columns < width, columns, x_stride, heads, queries, width, mask_batch, mask_head,
                    mask_query, mask_column, scale, CAUSAL, BOOLEAN)  # fmt: skip
        y = tl.exp(x - base) * inverse
        tl.store(Y + row * width + columns, y.to(Y.dtype.element_ty), mask=columns < width)


@triton.jit
def _held_backward(
    GRADIENT, Y, OF_X, gradient_stride, y_stride, rows, width, scale, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (columns < width)
    y = tl.load(Y + row * y_stride + columns, mask=inside, other=0.0).to(tl.float32)
    gradient = tl.load(GRADIENT + row * gradient_stride + columns, mask=inside, other=0.0).to(tl.float32)
    along = gradient * y
    of_x = (along - y * tl.sum(along, axis=1)[:, None]) * scale
    tl.store(OF_X + row * width + columns, of_x.to(OF_X.dtype.element_ty), mask=inside)


@triton.jit
def _streamed_backward(GRADIENT, Y, OF_X, gradient_stride, y_stride, width, scale, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, width, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        y = tl.load(Y + row * y_stride + columns, mask=columns < width, other=0.0).to(tl.float32)
        gradient = tl.load(GRADIENT + row * gradient_stride + columns, mask=columns < width, other=0.0).to(tl.float32)
        sums += gradient * y
    total = tl.sum(sums, axis=0)
    for first in range(0, width, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        y = tl.load(Y + row * y_stride + columns, mask=columns < width, other=0.0).to(tl.float32)
        gradient = tl.load(GRADIENT + row * gradient_stride + columns, mask=columns < width, other=0.0).to(tl.float32)
        of_x = (gradient - total) * y * scale
        tl.store(OF_X + row * width + columns, of_x.to(OF_X.dtype.element_ty), mask=columns < width)


def softmax(x: Tensor, mask: Tensor | None, scale: float, causal: bool, dtype: torch.dtype | None) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype if dtype is None else dtype, device=x.device)
    rows = rows_of(x)
    count, width = rows.shape
    # Where a row's mask is follows from its batch, head and query; what a mask is repeated along has no stride.
    shape = (*[1] * (_LEAST_DIMENSIONS - x.dim()), *x.shape)
    heads, queries = shape[-3:-1]
    spread = None if mask is None else mask.expand(shape).flatten(0, -_LEAST_DIMENSIONS)
    strides = (0, 0, 0, 0) if spread is None else spread.stride()
    is_boolean = spread is not None and spread.dtype == torch.bool
    given = (spread.view(torch.uint8) if is_boolean else spread) if spread is not None else None
    sizes = (heads, queries, width, *strides, scale)
    constants = {"CAUSAL": causal, "BOOLEAN": is_boolean}
    tile = tile_for(_HELD_FORWARD, width)
    if tile is None:
        launch(_streamed_forward, count, rows, given, y, rows.stride(0), *sizes, warps=_STREAMED.warps,
               BLOCK=_STREAMED.width, **constants)  # fmt: skip
    else:
        launch(_held_forward, triton.cdiv(count, tile.rows), rows, given, y, rows.stride(0), count, *sizes,
               warps=tile.warps, ROWS=tile.rows, BLOCK=power_of_two(width), **constants)  # fmt: skip
    return y


def softmax_backward(gradient: Tensor, y: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    of_x = torch.empty(y.shape, dtype=dtype, device=y.device)
    gradients, rows = rows_of(gradient), rows_of(y)
    count, width = rows.shape
    strides = (gradients.stride(0), rows.stride(0))
    tile = tile_for(_HELD, width)
    if tile is None:
        launch(_streamed_backward, count, gradients, rows, of_x, *strides, width, scale, warps=_STREAMED.warps,
               BLOCK=_STREAMED.width)  # fmt: skip
    else:
        launch(_held_backward, triton.cdiv(count, tile.rows), gradients, rows, of_x, *strides, count, width, scale,
               warps=tile.warps, ROWS=tile.rows, BLOCK=power_of_two(width))  # fmt: skip
    return of_x
