"""Numbers with scales and their products on a GPU; functions have the arguments and results of those in `reference`.

Rows that fit in a program's registers are read once; of wider ones, and of a tensor, the magnitude is found first.
Products of float8 are torch's own, by cuBLAS and CUTLASS, where it takes them. Those of the kernel here, of int8 and of
what that leaves, are scaled before they are written: sums of 32 bits do not reach memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphopt._torch import scaled_product
from graphopt.triton_kernels.launch import Tile, launch, multiprocessors, power_of_two, rows_of, tile_for
from graphopt.triton_kernels.quantization.kernel import ProductTile, magnitude, nearest, ratio, scale_of
from graphopt.triton_kernels.quantization.reference import FLOAT8, LARGEST
from graphopt.triton_kernels.quantization.reference import scale_of as scale_in_torch

_HELD = (Tile(256, 8, 4), Tile(1024, 4, 4), Tile(2048, 2, 4), Tile(4096, 1, 4), Tile(8192, 1, 8), Tile(16384, 1, 16))
_STREAMED = Tile(4096, 1, 8)  # of wider rows: so many columns at once
_ELEMENTS, _WARPS = 2048, 4  # of a tile of a whole tensor
_PROGRAMS = 8  # of a multiprocessor, each with a maximum
_TILES = (
    ProductTile(16, rows=16, outputs=32, inputs=256, warps=4, stages=4),
    ProductTile(64, rows=64, outputs=64, inputs=128, warps=4, stages=4),
    ProductTile(float("inf"), rows=128, outputs=128, inputs=128, warps=8, stages=4),
)
_LEAST_INPUTS = 32  # of a product of bytes on tensor cores
_BAND = 8  # tiles of rows that go through all outputs together, so that weights are found in the cache
_MULTIPLE = 16  # of inputs and outputs, where a product is torch's


@triton.jit
def _put(VALUES, at, x, scale, limit, mask):
    found = ratio(x, scale, limit)
    if VALUES.dtype.element_ty == tl.int8:
        found = nearest(found)
    tl.store(VALUES + at, found.to(VALUES.dtype.element_ty), mask=mask)


@triton.jit
def _quantize_rows(
    X, VALUES, SCALES, stride, rows, width, limit, ROWS: tl.constexpr, BLOCK: tl.constexpr, HELD: tl.constexpr
):  # fmt: skip
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    if HELD:
        inside = (row < rows) & (column < width)
        x = tl.load(X + row * stride + column, mask=inside, other=0.0).to(tl.float32)
        scale = scale_of(tl.max(magnitude(x), axis=1)[:, None], limit)
        _put(VALUES, row * width + column, x, scale, limit, inside)
    else:
        largest = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
        for first in range(0, width, BLOCK):
            inside = (row < rows) & (first + column < width)
            x = tl.load(X + row * stride + first + column, mask=inside, other=0.0).to(tl.float32)
            largest = tl.maximum(largest, magnitude(x))
        scale = scale_of(tl.max(largest, axis=1)[:, None], limit)
        for first in range(0, width, BLOCK):
            inside = (row < rows) & (first + column < width)
            x = tl.load(X + row * stride + first + column, mask=inside, other=0.0).to(tl.float32)
            _put(VALUES, row * width + first + column, x, scale, limit, inside)
    tl.store(SCALES + row, scale, mask=row < rows)


@triton.jit
def _largest(X, LARGEST, count, programs, BLOCK: tl.constexpr):
    largest = tl.zeros((BLOCK,), dtype=tl.float32)
    for block in range(tl.program_id(0).to(tl.int64), tl.cdiv(count, BLOCK), programs):
        at = block * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(X + at, mask=at < count, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, magnitude(x))
    tl.store(LARGEST + tl.program_id(0), tl.max(largest, axis=0))


@triton.jit
def _quantize(X, VALUES, SCALE, count, limit, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + at, mask=at < count, other=0.0).to(tl.float32)
    _put(VALUES, at, x, tl.load(SCALE), limit, at < count)


@triton.jit
def _product(
    X, X_SCALES, WEIGHT, WEIGHT_SCALES, BIAS, Y, stride, weight_stride, rows, outputs, inputs,
    OF_ROWS: tl.constexpr, OF_OUTPUTS: tl.constexpr, MASKED: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr, STAGES: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    row_tiles = tl.cdiv(rows, ROWS)
    of_band = BAND * tl.cdiv(outputs, OUTPUTS)
    first_tile = (tl.program_id(0) // of_band) * BAND
    height = tl.minimum(row_tiles - first_tile, BAND)
    tile = tl.program_id(0) % of_band
    row = ((first_tile + tile % height) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    output = ((tile // height) * OUTPUTS + tl.arange(0, OUTPUTS)).to(tl.int64)
    x_rows, weight_rows = X + row[:, None] * stride, WEIGHT + output[:, None] * weight_stride
    if X.dtype.element_ty == tl.int8:
        sums = tl.zeros((ROWS, OUTPUTS), dtype=tl.int32)
    else:
        sums = tl.zeros((ROWS, OUTPUTS), dtype=tl.float32)
    for first in tl.range(0, inputs, INPUTS, num_stages=STAGES):
        at = first + tl.arange(0, INPUTS)[None, :]
        x_mask, weight_mask = row[:, None] < rows, output[:, None] < outputs
        if MASKED:
            x_mask, weight_mask = x_mask & (at < inputs), weight_mask & (at < inputs)
        x = tl.load(x_rows + at, mask=x_mask, other=0.0)
        weight = tl.load(weight_rows + at, mask=weight_mask, other=0.0)
        # Tensor cores of Hopper add up float8 with fewer bits than float32 has: no longer than over these inputs.
        sums = tl.dot(x, tl.trans(weight), sums, max_num_imprecise_acc=INPUTS, out_dtype=sums.dtype)
    y = sums.to(tl.float32)
    y *= tl.load(X_SCALES + row, mask=row < rows, other=0.0)[:, None] if OF_ROWS else tl.load(X_SCALES)
    if OF_OUTPUTS:
        y *= tl.load(WEIGHT_SCALES + output, mask=output < outputs, other=0.0)[None, :]
    else:
        y *= tl.load(WEIGHT_SCALES)
    if BIAS is not None:
        y += tl.load(BIAS + output, mask=output < outputs, other=0.0).to(tl.float32)[None, :]
    inside = (row[:, None] < rows) & (output[None, :] < outputs)
    tl.store(Y + row[:, None] * outputs + output[None, :], y.to(Y.dtype.element_ty), mask=inside)


def quantize_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    values = torch.empty(x.shape, dtype=dtype, device=x.device)
    scales = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    rows = rows_of(x)
    count, width = rows.shape
    tile = tile_for(_HELD, width)
    _, height, warps = tile or _STREAMED
    block = power_of_two(width) if tile else _STREAMED.width
    launch(_quantize_rows, triton.cdiv(count, height), rows, values, scales, rows.stride(0), count, width,
           LARGEST[dtype], warps=warps, ROWS=height, BLOCK=block, HELD=tile is not None)  # fmt: skip
    return values, scales


def quantize_tensor(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    flat = x.contiguous().view(-1)
    values = torch.empty(x.shape, dtype=dtype, device=x.device)
    blocks = triton.cdiv(len(flat), _ELEMENTS)
    programs = min(blocks, _PROGRAMS * multiprocessors(x.device))
    parts = torch.zeros(max(1, programs), dtype=torch.float32, device=x.device)
    launch(_largest, programs, flat, parts, len(flat), programs, warps=_WARPS, BLOCK=_ELEMENTS)
    scale = scale_in_torch(parts.amax(), LARGEST[dtype])
    launch(_quantize, blocks, flat, values, scale, len(flat), LARGEST[dtype], warps=_WARPS, BLOCK=_ELEMENTS)
    return values, scale


def scaled_mm(
    x: Tensor, x_scales: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    rows = rows_of(x)
    count, inputs = rows.shape
    outputs = len(weight)
    per_row, per_output = x_scales.dim() > 0, weight_scales.dim() > 0
    if _takes_torch(rows, weight, per_row == per_output, bias, dtype):
        shaped = (
            x_scales.reshape(-1, 1) if per_row else x_scales,
            weight_scales.view(1, -1) if per_output else weight_scales,
        )
        return scaled_product(rows, weight.t(), *shaped, bias, dtype).view(*x.shape[:-1], outputs)
    y = torch.empty(*x.shape[:-1], outputs, dtype=dtype, device=x.device)
    tile = next(tile for tile in _TILES if count <= tile.most)
    block = min(tile.inputs, max(_LEAST_INPUTS, power_of_two(inputs)))
    programs = triton.cdiv(count, tile.rows) * triton.cdiv(outputs, tile.outputs)
    launch(_product, programs, rows, x_scales.contiguous(), weight,
           weight_scales.contiguous(), bias, y, rows.stride(0),
           weight.stride(0), count, outputs, inputs, warps=tile.warps, OF_ROWS=per_row, OF_OUTPUTS=per_output,
           MASKED=inputs % block != 0, ROWS=tile.rows, OUTPUTS=tile.outputs, INPUTS=block, STAGES=tile.stages,
           BAND=_BAND)  # fmt: skip
    return y


def _takes_torch(rows: Tensor, weight: Tensor, alike: bool, bias: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether `scaled_product` computes this; scales of rows it has from Hopper on, and for bfloat16."""
    if not rows.is_cuda or rows.dtype not in FLOAT8 or not alike or dtype != torch.bfloat16:
        return False
    if rows.dtype == weight.dtype == torch.float8_e5m2 or torch.cuda.get_device_capability(rows.device) < (9, 0):
        return False
    fits = len(rows) and all(size and size % _MULTIPLE == 0 for size in weight.shape)
    return bool(fits) and rows.is_contiguous() and (bias is None or bias.dtype == dtype)
