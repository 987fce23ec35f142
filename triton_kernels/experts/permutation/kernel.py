"""Tokens by expert and back on a GPU; functions have the arguments and results of those in `reference`.

The sort counts (Knuth, The Art of Computer Programming, volume 3, section 5.2): each program counts the experts of a
block of choices, sums over blocks tell where those of a block begin, and a choice stands behind those of its expert
before it in the block. No two programs write one number, so the order is stable and what comes of it always the same.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphopt.triton_kernels.launch import launch, power_of_two, rows_of

_CHOICES = 256  # of a block
_CHUNK = 16  # of them that all are compared with at once
_LEAST_BINS = 32  # experts that are counted: triton's histogram has one for each thread of a warp
_BLOCKS, _COLUMNS = 256, 16  # of counts that are summed at once
_MOVED = 2048  # elements of a row that a program moves
_SUMMED = 4096  # elements of two rows that are multiplied at once
_WARPS = 4


@triton.jit
def _experts(CHOSEN, at, count, experts):
    expert = tl.load(CHOSEN + at, mask=at < count, other=-1)
    return tl.where((expert < 0) | (expert >= experts), experts, expert).to(tl.int32)


@triton.jit
def _count(CHOSEN, COUNTS, count, experts, BINS: tl.constexpr, CHOICES: tl.constexpr):
    block = tl.program_id(0)
    expert = _experts(CHOSEN, block * CHOICES + tl.arange(0, CHOICES), count, experts)
    tl.store(COUNTS + block * BINS + tl.arange(0, BINS), tl.histogram(expert, BINS))


@triton.jit
def _sum_before(COUNTS, TOTALS, blocks, BINS: tl.constexpr, BLOCKS: tl.constexpr, COLUMNS: tl.constexpr):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), dtype=tl.int32)
    for first in range(0, blocks, BLOCKS):
        block = first + tl.arange(0, BLOCKS)
        at = block[:, None] * BINS + column[None, :]
        inside = (block < blocks)[:, None]
        counts = tl.load(COUNTS + at, mask=inside, other=0)
        tl.store(COUNTS + at, total[None, :] + tl.cumsum(counts, axis=0) - counts, mask=inside)
        total += tl.sum(counts, axis=0)
    tl.store(TOTALS + column, total)


@triton.jit
def _place(
    CHOSEN, COUNTS, TOTALS, ORDER, PLACES, ENDS, count, experts,
    BINS: tl.constexpr, CHOICES: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    bins = tl.arange(0, BINS)
    totals = tl.load(TOTALS + bins)
    ends = tl.cumsum(totals, axis=0)
    if block == 0:
        tl.store(ENDS + bins, ends, mask=bins < experts)
    at = block * CHOICES + tl.arange(0, CHOICES)
    expert = _experts(CHOSEN, at, count, experts)
    place = tl.gather(ends - totals, expert, 0) + tl.load(COUNTS + block * BINS + expert)
    for first in range(block * CHOICES, (block + 1) * CHOICES, CHUNK):
        others = first + tl.arange(0, CHUNK)
        is_alike = _experts(CHOSEN, others, count, experts)[None, :] == expert[:, None]
        place += tl.sum((is_alike & (others[None, :] < at[:, None])).to(tl.int32), axis=1)
    inside = at < count
    tl.store(PLACES + at, place.to(tl.int64), mask=inside)
    tl.store(ORDER + place, at.to(tl.int64), mask=inside)


@triton.jit
def _width_at(place, count, width):
    """Of a row: none where there is no such row."""
    return tl.where((place >= 0) & (place < count), width, 0)


@triton.jit
def _permute(X, PLACES, ROWS, stride, count, width, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    blocks = tl.cdiv(width, BLOCK)
    token = (tl.program_id(0) // blocks).to(tl.int64)
    columns = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    x = tl.load(X + token * stride + columns, mask=inside, other=0.0)
    for index in tl.static_range(TOP_K):
        place = tl.load(PLACES + token * TOP_K + index)
        tl.store(ROWS + place * width + columns, x, mask=columns < _width_at(place, count, width))


@triton.jit
def _unpermute(ROWS, WEIGHTS, PLACES, Y, stride, count, width, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    blocks = tl.cdiv(width, BLOCK)
    token = (tl.program_id(0) // blocks).to(tl.int64)
    columns = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for index in tl.static_range(TOP_K):
        place = tl.load(PLACES + token * TOP_K + index)
        is_row = columns < _width_at(place, count, width)
        row = tl.load(ROWS + place * stride + columns, mask=is_row, other=float("nan")).to(tl.float32)
        if WEIGHTS is not None:
            row *= tl.load(WEIGHTS + token * TOP_K + index).to(tl.float32)
        total += row
    tl.store(Y + token * width + columns, total.to(Y.dtype.element_ty), mask=inside)


@triton.jit
def _unpermute_backward(
    GRADIENT, ROWS, WEIGHTS, PLACES, OF_ROWS, OF_WEIGHTS, gradient_stride, stride, count, width, top_k,
    BLOCK: tl.constexpr,
):  # fmt: skip
    choice = tl.program_id(0).to(tl.int64)
    token = choice // top_k
    place = tl.load(PLACES + choice)
    weight = tl.load(WEIGHTS + choice).to(tl.float32)
    products = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, width, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        inside = columns < width
        is_row = columns < _width_at(place, count, width)
        gradient = tl.load(GRADIENT + token * gradient_stride + columns, mask=inside, other=0.0).to(tl.float32)
        row = tl.load(ROWS + place * stride + columns, mask=is_row, other=0.0).to(tl.float32)
        products += gradient * row
        tl.store(OF_ROWS + place * width + columns, (weight * gradient).to(OF_ROWS.dtype.element_ty), mask=is_row)
    tl.store(OF_WEIGHTS + choice, tl.sum(products, axis=0).to(OF_WEIGHTS.dtype.element_ty))


def sort_by_expert(chosen: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    flat = chosen.contiguous().view(-1)
    count, device = flat.numel(), chosen.device
    order, places = (torch.empty(shape, dtype=torch.int64, device=device) for shape in (count, chosen.shape))
    if not count:
        return order, places, torch.zeros(experts, dtype=torch.int32, device=device)
    ends = torch.empty(experts, dtype=torch.int32, device=device)
    bins, blocks = max(_LEAST_BINS, power_of_two(experts + 1)), triton.cdiv(count, _CHOICES)
    counts, totals = (torch.empty(n * bins, dtype=torch.int32, device=device) for n in (blocks, 1))
    launch(_count, blocks, flat, counts, count, experts, warps=_WARPS, BINS=bins, CHOICES=_CHOICES)
    launch(_sum_before, bins // _COLUMNS, counts, totals, blocks, warps=_WARPS, BINS=bins, BLOCKS=_BLOCKS,
           COLUMNS=_COLUMNS)  # fmt: skip
    launch(_place, blocks, flat, counts, totals, order, places, ends, count, experts, warps=_WARPS, BINS=bins,
           CHOICES=_CHOICES, CHUNK=_CHUNK)  # fmt: skip
    return order, places, ends


def permute_tokens(x: Tensor, places: Tensor) -> Tensor:
    tokens = rows_of(x)
    count, width = places.numel(), tokens.shape[1]
    rows = torch.empty(count, width, dtype=x.dtype, device=x.device)
    block = min(_MOVED, power_of_two(width))
    launch(_permute, len(tokens) * triton.cdiv(width, block), tokens, places.contiguous(), rows, tokens.stride(0),
           count, width, warps=_WARPS, TOP_K=places.shape[1], BLOCK=block)  # fmt: skip
    return rows


def unpermute_tokens(rows: Tensor, weights: Tensor | None, places: Tensor) -> Tensor:
    given = rows_of(rows)
    count, width = given.shape
    y = torch.empty(len(places), width, dtype=rows.dtype, device=rows.device)
    block = min(_MOVED, power_of_two(width))
    launch(_unpermute, len(y) * triton.cdiv(width, block), given, None if weights is None else weights.contiguous(),
           places.contiguous(), y, given.stride(0), count, width,
           warps=_WARPS, TOP_K=places.shape[1], BLOCK=block)  # fmt: skip
    return y


def unpermute_tokens_backward(gradient: Tensor, rows: Tensor, weights: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    given, gradients = rows_of(rows), rows_of(gradient)
    count, width = given.shape
    of_rows = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
    of_weights = torch.empty(weights.shape, dtype=weights.dtype, device=rows.device)
    block = min(_SUMMED, power_of_two(width))
    launch(_unpermute_backward, count, gradients, given, weights.contiguous(), places.contiguous(), of_rows, of_weights,
           gradients.stride(0), given.stride(0), count, width, places.shape[1],
           warps=max(1, 2 * _WARPS * block // _SUMMED), BLOCK=block)  # fmt: skip
    return of_rows, of_weights
