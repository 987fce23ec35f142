"""Blocks of a flat tensor in few bits, to be sent in its place, in operators of torch.

    quantize_blocks      values and scales of all blocks
    dequantize_blocks    numbers again; those of several pieces are added up

Quantized gradients are exchanged by an all-to-all, after which each rank adds up the pieces that it got: ZeRO++ (Wang
et al. 2023, arXiv:2306.10209). How a block becomes values and a scale is in
`graphopt.triton_kernels.quantization.reference`.

Values of 8 bits are int8 [blocks, block]; of 4 bits uint8 [blocks, block / 2]: byte j of a block holds its value j plus
8 in the low four bits, and j + block / 2 in the high ones. The last block is filled up with zeros. Scales are float32
[blocks].

Rounding is to nearest, ties to even, or by chance where a seed is given: up as often as the number is near to the upper
of two values, so that it is right on average. Chance is Philox (Salmon et al. 2011, doi:10.1145/2063384.2063405), by
seed and place in the tensor, alike on each device.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from graphopt.cuda_ext.reference import packed, unpacked
from graphopt.triton_kernels.quantization.reference import rows_in

LIMITS = {8: 127.0, 4: 7.0}  # by bits
_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


def quantize_blocks(x: Tensor, bits: int, block: int, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    """x: [count]."""
    blocks = F.pad(x, (0, -len(x) % block)).view(-1, block)
    limit = LIMITS[bits]
    found, scales = rows_in(blocks, limit)
    random = None if seed is None else uniform(seed, *blocks.shape)
    values = found.round() if random is None else (found + random).floor().clamp(-limit, limit)
    return values.to(torch.int8) if bits == 8 else packed(values + 8), scales


def dequantize_blocks(values: Tensor, scales: Tensor, bits: int, count: int, dtype: torch.dtype) -> Tensor:
    """[count] numbers. values, scales: of one piece, or of several, [pieces, blocks, ...], added up in float32."""
    numbers = values.float() if bits == 8 else unpacked(values).float() - 8
    found = numbers * scales[..., None]
    total = found if values.dim() == 2 else found.sum(0)
    return total.reshape(-1)[:count].to(dtype)


def uniform(seed: Tensor, blocks: int, block: int) -> Tensor:
    """Numbers [blocks, block], at least 0 and below 1, float32: the four of a counter go to the quarters of a block."""
    quarter = block // 4
    counters = torch.arange(blocks * quarter, device=seed.device).view(blocks, quarter)
    state = [counters & _MASK, counters >> 32 & _MASK, torch.zeros_like(counters), torch.zeros_like(counters)]
    keys = [seed & _MASK, seed >> 32 & _MASK]
    for _ in range(_ROUNDS):
        # Products of 64 bits, whose halves the sign of the highest bit does not change.
        first, second = state[0] * _MULTIPLIERS[0], state[2] * _MULTIPLIERS[1]
        state = [
            (second >> 32 & _MASK) ^ state[1] ^ keys[0],
            second & _MASK,
            (first >> 32 & _MASK) ^ state[3] ^ keys[1],
            first & _MASK,
        ]
        keys = [key + step & _MASK for key, step in zip(keys, _WEYL, strict=True)]
    return torch.cat(state, dim=-1).bitwise_right_shift(8).float() * 2.0**-24
