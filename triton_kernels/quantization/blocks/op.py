"""The operators of blocks. What they compute is written in `reference`."""

from typing import Any

import torch
from torch import Tensor

from graphopt.triton_kernels.choice import OF_TRITON, Family
from graphopt.triton_kernels.quantization.blocks.reference import LIMITS
from graphopt.triton_kernels.registration import check_bits, check_floating, define, describe

FAMILY = Family("quantization.blocks", widest=2**63 - 1, triton=OF_TRITON | {torch.int8, torch.uint8}, of_models=True)
_LEAST_BLOCK, _LARGEST_BLOCK = 16, 4096


def _quantize_blocks(x: Tensor, bits: int, block: int, seed: Tensor | None) -> Any:
    operator = "quantize_blocks"
    check_floating(operator, "x", x, 0)
    check_bits(operator, bits, LIMITS)
    if not _LEAST_BLOCK <= block <= _LARGEST_BLOCK or block & (block - 1):
        raise ValueError(f"{operator}: block is {block}, not a power of two from {_LEAST_BLOCK} to {_LARGEST_BLOCK}")
    if seed is not None and (seed.dim() or seed.dtype != torch.int64 or seed.device != x.device):
        raise ValueError(f"{operator}: seed is {describe(seed)}, not int64 [] on {x.device}")
    return FAMILY.run(operator, x.reshape(-1), bits, block, seed)


def _dequantize_blocks(values: Tensor, scales: Tensor, bits: int, count: int, dtype: torch.dtype) -> Any:
    operator = "dequantize_blocks"
    check_bits(operator, bits, LIMITS)
    wanted = torch.int8 if bits == 8 else torch.uint8
    block = values.shape[-1] * 8 // bits if values.dim() else 0
    fits = values.dim() in (2, 3) and _LEAST_BLOCK <= block <= _LARGEST_BLOCK and not block & (block - 1)
    if values.dtype != wanted or not fits:
        raise ValueError(
            f"{operator}: values are {describe(values)}, not {wanted} [blocks, bytes] or [pieces, blocks, bytes]"
            f" of blocks from {_LEAST_BLOCK} to {_LARGEST_BLOCK} numbers, a power of two"
        )
    if scales.shape != values.shape[:-1] or scales.dtype != torch.float32 or scales.device != values.device:
        raise ValueError(
            f"{operator}: scales are {describe(scales)}, not float32 {list(values.shape[:-1])} on {values.device}"
        )
    most = values.shape[-2] * block
    if not max(0, most - block + 1) <= count <= most:
        raise ValueError(f"{operator}: count is {count}, which does not fit {values.shape[-2]} blocks of {block}")
    if not dtype.is_floating_point:
        raise ValueError(f"{operator}: dtype is {dtype}, not floating")
    return FAMILY.run(operator, values, scales, bits, count, dtype)


def _of_blocks(x: Tensor, bits: int, block: int, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    blocks = (x.numel() + block - 1) // block
    values = x.new_empty(blocks, block * bits // 8, dtype=torch.int8 if bits == 8 else torch.uint8)
    return values, x.new_empty(blocks, dtype=torch.float32)


QUANTIZE_BLOCKS = define(
    "quantize_blocks(Tensor x, int bits, int block, Tensor? seed) -> (Tensor, Tensor)",
    _quantize_blocks,
    _of_blocks,
    family=FAMILY,
)
DEQUANTIZE_BLOCKS = define(
    "dequantize_blocks(Tensor values, Tensor scales, int bits, SymInt count, ScalarType dtype) -> Tensor",
    _dequantize_blocks,
    lambda values, scales, bits, count, dtype: values.new_empty(count, dtype=dtype),
    family=FAMILY,
)
