"""Blocks in few bits on a GPU; functions have the arguments and results of those in `reference`.

Both kernels read each number once. A tile holds whole blocks, as four quarters, each of which has one of the four
random numbers that Philox gives for a counter; the two numbers of a byte are in quarters of one thread.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphopt.triton_kernels.launch import launch
from graphopt.triton_kernels.quantization.blocks.reference import LIMITS
from graphopt.triton_kernels.quantization.kernel import magnitude, nearest, ratio, scale_of

_ELEMENTS = 4096  # of a tile: 8 in a thread of each quarter
_WARPS = 4
_SUMMED = 4096  # numbers that a program gives, or 2048 bytes of 4 bits


@triton.jit
def _loaded(X, at, count):
    return tl.load(X + at, mask=at < count, other=0.0).to(tl.float32)


@triton.jit
def _rounded(x, scale, random, limit, RANDOM: tl.constexpr):
    found = ratio(x, scale, limit)
    if RANDOM:
        up = (random >> 8).to(tl.float32) * 5.9604644775390625e-08  # 2^-24: from 0 to 1
        found = tl.minimum(tl.floor(found + up), limit)
    else:
        found = nearest(found)
    return found.to(tl.int32)


@triton.jit
def _quantize(
    X, VALUES, SCALES, SEED, count, blocks, limit,
    BITS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    QUARTER: tl.constexpr = BLOCK // 4
    row = (tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS))[:, None]
    column = tl.arange(0, QUARTER)[None, :]
    at = row * BLOCK + column
    a, b = _loaded(X, at, count), _loaded(X, at + QUARTER, count)
    c, d = _loaded(X, at + 2 * QUARTER, count), _loaded(X, at + 3 * QUARTER, count)
    largest = tl.maximum(tl.maximum(magnitude(a), magnitude(b)), tl.maximum(magnitude(c), magnitude(d)))
    scale = scale_of(tl.max(largest, axis=1)[:, None], limit)
    tl.store(SCALES + row, scale, mask=row < blocks)
    if SEED is not None:
        p, q, r, s = tl.randint4x(tl.load(SEED), row * QUARTER + column)
    else:
        p, q, r, s = column, column, column, column
    a, b = _rounded(a, scale, p, limit, SEED is not None), _rounded(b, scale, q, limit, SEED is not None)
    c, d = _rounded(c, scale, r, limit, SEED is not None), _rounded(d, scale, s, limit, SEED is not None)
    inside = (row < blocks) & (column < QUARTER)
    if BITS == 8:
        tl.store(VALUES + at, a.to(tl.int8), mask=inside)
        tl.store(VALUES + at + QUARTER, b.to(tl.int8), mask=inside)
        tl.store(VALUES + at + 2 * QUARTER, c.to(tl.int8), mask=inside)
        tl.store(VALUES + at + 3 * QUARTER, d.to(tl.int8), mask=inside)
    else:
        at = row * (BLOCK // 2) + column
        tl.store(VALUES + at, (a + 8 | (c + 8) << 4).to(tl.uint8), mask=inside)
        tl.store(VALUES + at + QUARTER, (b + 8 | (d + 8) << 4).to(tl.uint8), mask=inside)


@triton.jit
def _dequantize(
    VALUES, SCALES, Y, pieces, blocks, count,
    BITS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    BYTES: tl.constexpr = BLOCK * BITS // 8
    row = (tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS))[:, None]
    column = tl.arange(0, BYTES)[None, :]
    inside = (row < blocks) & (column < BYTES)
    low = tl.zeros((BLOCKS, BYTES), dtype=tl.float32)
    high = tl.zeros((BLOCKS, BYTES), dtype=tl.float32)
    for piece in range(pieces):
        own = piece * blocks + row
        scale = tl.load(SCALES + own, mask=row < blocks, other=0.0)
        held = tl.load(VALUES + own * BYTES + column, mask=inside, other=0)
        if BITS == 8:
            low += held.to(tl.float32) * scale
        else:
            low += ((held & 15).to(tl.float32) - 8.0) * scale
            high += ((held >> 4).to(tl.float32) - 8.0) * scale
    at = row * BLOCK + column
    tl.store(Y + at, low.to(Y.dtype.element_ty), mask=at < count)
    if BITS == 4:
        at += BYTES
        tl.store(Y + at, high.to(Y.dtype.element_ty), mask=at < count)


def quantize_blocks(x: Tensor, bits: int, block: int, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    flat = x.contiguous()
    blocks = triton.cdiv(len(flat), block)
    dtype = torch.int8 if bits == 8 else torch.uint8
    values = torch.empty(blocks, block * bits // 8, dtype=dtype, device=x.device)
    scales = torch.empty(blocks, dtype=torch.float32, device=x.device)
    height = max(1, _ELEMENTS // block)
    launch(_quantize, triton.cdiv(blocks, height), flat, values, scales, seed, len(flat), blocks, LIMITS[bits],
           warps=_WARPS, BITS=bits, BLOCK=block, BLOCKS=height)  # fmt: skip
    return values, scales


def dequantize_blocks(values: Tensor, scales: Tensor, bits: int, count: int, dtype: torch.dtype) -> Tensor:
    y = torch.empty(count, dtype=dtype, device=values.device)
    blocks, held = values.shape[-2:]
    block, pieces = held * 8 // bits, 1 if values.dim() == 2 else len(values)
    height = max(1, _SUMMED // block)
    launch(_dequantize, triton.cdiv(blocks, height), values.contiguous(), scales.contiguous(), y, pieces, blocks, count,
           warps=_WARPS, BITS=bits, BLOCK=block, BLOCKS=height)  # fmt: skip
    return y
