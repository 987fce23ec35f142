"""Weights of few bits on a GPU; functions have the arguments and results of those in `reference`.

A product of few rows takes the time that its weights take from memory. A tile of them is the first operand, so that it
becomes floats in the registers that tensor cores read; rows of x, which fill tiles badly, are the second. Values less
their zeros are integers that the dtype of x holds exactly; each group's sum is scaled, in float32. The two numbers of a
byte are half a group apart: each half of a group is a product with neighboring inputs, and nothing is shuffled. Where
there are few tiles, several programs share the inputs of one, and their sums are added up behind.

For many rows weights are made floats once, in memory, and the product is that of torch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from graphopt.triton_kernels.launch import launch, multiprocessors, power_of_two, rows_of
from graphopt.triton_kernels.quantization.kernel import ProductTile

# Inputs are bytes of a row of values. Most weights are read by few programs: the smallest tile is for rows that decode.
_TILES = (
    ProductTile(16, rows=16, outputs=64, inputs=128, warps=4, stages=4),
    ProductTile(64, rows=64, outputs=128, inputs=64, warps=8, stages=4),
    ProductTile(512, rows=128, outputs=128, inputs=32, warps=8, stages=4),
)
_FLOAT32_TILE = ProductTile(512, rows=16, outputs=64, inputs=32, warps=4, stages=2)  # without tensor cores
_LEAST_INPUTS = 16  # of a product on tensor cores
_SPLITS, _LEAST_STEPS = 8, 4  # programs that share a tile at most, steps of each at least
_PROGRAMS = 2  # of a multiprocessor, where there are few tiles
_SUMMED, _SUM_WARPS = 1024, 4
_BYTES, _BYTE_WARPS = 2048, 4  # of a tile that becomes floats: 16 in a thread
_WIDEST = 1024


@triton.jit
def _added(part, held, zero, X, x_mask):
    """[outputs, rows]: the product of values less their zeros with rows of x, [rows, inputs] from a pointer."""
    x = tl.load(X, mask=x_mask, other=0.0)
    weight = held.to(x.dtype) if zero is None else (held.to(tl.float32) - zero).to(x.dtype)
    return tl.dot(weight, tl.trans(x), part, input_precision="ieee")


@triton.jit
def _product(
    X, VALUES, SCALES, ZEROS, BIAS, Y, stride, rows, inputs, outputs, groups, bytes_of_group, splits,
    BITS: tl.constexpr, MASKED: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, BYTES: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    row_tiles = tl.cdiv(rows, ROWS)
    tiles = row_tiles * tl.cdiv(outputs, OUTPUTS)
    split = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    row = (tile % row_tiles) * ROWS + tl.arange(0, ROWS)
    output = ((tile // row_tiles) * OUTPUTS + tl.arange(0, OUTPUTS)).to(tl.int64)
    x_rows = X + row.to(tl.int64)[:, None] * stride
    value_rows = VALUES + output[:, None] * (inputs * BITS // 8)
    steps_of_group = tl.cdiv(bytes_of_group, BYTES)
    steps = groups * steps_of_group
    sums = tl.zeros((OUTPUTS, ROWS), dtype=tl.float32)
    for step in tl.range(steps * split // splits, steps * (split + 1) // splits, num_stages=STAGES):
        group = step // steps_of_group
        byte = (step % steps_of_group) * BYTES + tl.arange(0, BYTES)[None, :]
        x_mask, mask = row[:, None] < rows, output[:, None] < outputs
        if MASKED:
            x_mask, mask = x_mask & (byte < bytes_of_group), mask & (byte < bytes_of_group)
        held = tl.load(value_rows + group * bytes_of_group + byte, mask=mask, other=0)
        scale = tl.load(SCALES + output * groups + group, mask=output < outputs, other=0.0)[:, None]
        zero = None
        if ZEROS is not None:
            zero = tl.load(ZEROS + output * groups + group, mask=output < outputs, other=0.0)[:, None]
        part = tl.zeros((OUTPUTS, ROWS), dtype=tl.float32)
        if BITS == 8:
            part = _added(part, held, zero, x_rows + group * bytes_of_group + byte, x_mask)
        else:
            at = x_rows + 2 * group * bytes_of_group + byte
            low, high = (held & 15).to(tl.int8), (held >> 4).to(tl.int8)
            if ZEROS is None:
                low, high = low - 8, high - 8
            part = _added(part, low, zero, at, x_mask)
            part = _added(part, high, zero, at + bytes_of_group, x_mask)
        sums += part * scale
    if BIAS is not None:
        sums += tl.load(BIAS + output, mask=output < outputs, other=0.0).to(tl.float32)[:, None]
    at = (split.to(tl.int64) * rows + row[None, :]) * outputs + output[:, None]
    tl.store(Y + at, sums.to(Y.dtype.element_ty), mask=(row[None, :] < rows) & (output[:, None] < outputs))


@triton.jit
def _sum(PARTS, BIAS, Y, rows, outputs, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    blocks = tl.cdiv(outputs, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = column < outputs
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(PARTS + (split * rows + row) * outputs + column, mask=inside, other=0.0)
    if BIAS is not None:
        total += tl.load(BIAS + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(Y + row * outputs + column, total.to(Y.dtype.element_ty), mask=inside)


@triton.jit
def _dequantize(
    VALUES, SCALES, ZEROS, Y, groups, bytes_of_group,
    BITS: tl.constexpr, GROUPS: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """All groups of all outputs lie one after another."""
    blocks = tl.cdiv(bytes_of_group, BYTES)
    group = ((tl.program_id(0) // blocks).to(tl.int64) * GROUPS + tl.arange(0, GROUPS))[:, None]
    byte = (tl.program_id(0) % blocks) * BYTES + tl.arange(0, BYTES)[None, :]
    inside = (group < groups) & (byte < bytes_of_group)
    scale = tl.load(SCALES + group, mask=group < groups, other=0.0)
    zero = 0.0 if BITS == 8 else 8.0
    if ZEROS is not None:
        zero = tl.load(ZEROS + group, mask=group < groups, other=0.0)
    held = tl.load(VALUES + group * bytes_of_group + byte, mask=inside, other=0)
    if BITS == 8:
        weight = (held.to(tl.float32) - zero) * scale
        tl.store(Y + group * bytes_of_group + byte, weight.to(Y.dtype.element_ty), mask=inside)
    else:
        at = 2 * group * bytes_of_group + byte
        low, high = ((held & 15).to(tl.float32) - zero) * scale, ((held >> 4).to(tl.float32) - zero) * scale
        tl.store(Y + at, low.to(Y.dtype.element_ty), mask=inside)
        tl.store(Y + at + bytes_of_group, high.to(Y.dtype.element_ty), mask=inside)


def dequantize_weight(values: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, dtype: torch.dtype) -> Tensor:
    outputs, held = values.shape
    y = torch.empty(outputs, held * 8 // bits, dtype=dtype, device=values.device)
    groups = scales.numel()
    bytes_of_group = held // max(1, scales.shape[1])
    block = min(_WIDEST, power_of_two(bytes_of_group))
    height = _BYTES // block
    programs = triton.cdiv(groups, height) * triton.cdiv(bytes_of_group, block)
    launch(_dequantize, programs, values, scales, zeros, y, groups, bytes_of_group,
           warps=_BYTE_WARPS, BITS=bits, GROUPS=height, BYTES=block)  # fmt: skip
    return y


def quantized_linear(
    x: Tensor, values: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, bits: int
) -> Tensor:
    rows = rows_of(x)
    count, inputs = rows.shape
    outputs, groups = scales.shape
    tile = next((tile for tile in _TILES if count <= tile.most), None)
    if tile is None or not inputs:
        weight = dequantize_weight(values, scales, zeros, bits, x.dtype)
        return F.linear(x, weight, None if bias is None else bias.to(x.dtype))
    if x.dtype == torch.float32:
        tile = _FLOAT32_TILE
    bytes_of_group = values.shape[1] // groups
    block = min(tile.inputs, max(_LEAST_INPUTS, power_of_two(bytes_of_group)))
    steps = groups * triton.cdiv(bytes_of_group, block)
    tiles = triton.cdiv(count, tile.rows) * triton.cdiv(outputs, tile.outputs)
    wanted = _PROGRAMS * multiprocessors(x.device) // max(1, tiles)
    splits = max(1, min(_SPLITS, steps // _LEAST_STEPS, wanted))
    y = torch.empty(*x.shape[:-1], outputs, dtype=x.dtype, device=x.device)
    parts = y if splits == 1 else torch.empty(splits, count, outputs, dtype=torch.float32, device=x.device)
    launch(_product, tiles * splits, rows, values, scales, zeros, bias if splits == 1 else None, parts, rows.stride(0),
           count, inputs, outputs, groups, bytes_of_group, splits, warps=tile.warps, BITS=bits, ROWS=tile.rows,
           MASKED=bytes_of_group % block != 0, OUTPUTS=tile.outputs, BYTES=block, STAGES=tile.stages)  # fmt: skip
    if splits > 1:
        programs = count * triton.cdiv(outputs, _SUMMED)
        launch(_sum, programs, parts, bias, y, count, outputs, warps=_SUM_WARPS, SPLITS=splits, BLOCK=_SUMMED)
    return y
