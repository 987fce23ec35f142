"""Rotary embedding on a GPU; the function has the arguments and results of that in `reference`.

A program turns all heads of queries and keys at one position, and so reads its angles once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphopt.triton_kernels.launch import launch, power_of_two

_PAIRS = 1024  # of a tile: 8 in a thread
_WARPS = 4


@triton.jit
def _turn(
    X, Y, x_heads, y_heads, heads, cos, sin, half, width,
    FROM: tl.constexpr, TO: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """The rows of all heads at one position: X and Y point to those of the first."""
    for first in range(0, heads, HEADS):
        head = first + tl.arange(0, HEADS).to(tl.int64)[:, None]
        is_head = head < heads
        elements = tl.arange(0, 2 * HALF)[None, :]
        is_element = is_head & (elements < 2 * half)
        pair = tl.arange(0, HALF)[None, :]
        is_pair = is_head & (pair < half)
        if FROM:
            x = tl.load(X + head * x_heads + elements, mask=is_element, other=0.0).to(tl.float32)
            a, b = tl.split(tl.reshape(x, (HEADS, HALF, 2)))
        else:
            a = tl.load(X + head * x_heads + pair, mask=is_pair, other=0.0).to(tl.float32)
            b = tl.load(X + head * x_heads + pair + half, mask=is_pair, other=0.0).to(tl.float32)
        one = (a * cos - b * sin).to(Y.dtype.element_ty)
        other = (b * cos + a * sin).to(Y.dtype.element_ty)
        if TO:
            y = tl.reshape(tl.join(one, other), (HEADS, 2 * HALF))
            tl.store(Y + head * y_heads + elements, y, mask=is_element)
        else:
            tl.store(Y + head * y_heads + pair, one, mask=is_pair)
            tl.store(Y + head * y_heads + pair + half, other, mask=is_pair)
        if REST > 0:
            columns = 2 * half + tl.arange(0, REST)[None, :]
            inside = is_head & (columns < width)
            rest = tl.load(X + head * x_heads + columns, mask=inside)
            tl.store(Y + head * y_heads + columns, rest, mask=inside)


@triton.jit
def _rotary(
    Q, K, COS, SIN, Q_OUT, K_OUT,
    q_batch, q_heads, q_position, k_batch, k_heads, k_position,
    q_out_batch, q_out_heads, q_out_position, k_out_batch, k_out_heads, k_out_position,
    angle_batch, angle_position, heads, key_heads, positions, half, width,
    FROM: tl.constexpr, TO: tl.constexpr, INVERSE: tl.constexpr, HEADS: tl.constexpr, KEY_HEADS: tl.constexpr,
    HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    batch = (tl.program_id(0) // positions).to(tl.int64)
    position = (tl.program_id(0) % positions).to(tl.int64)
    pair = tl.arange(0, HALF)[None, :]
    at = batch * angle_batch + position * angle_position + pair
    cos = tl.load(COS + at, mask=pair < half, other=0.0).to(tl.float32)
    sin = tl.load(SIN + at, mask=pair < half, other=0.0).to(tl.float32)
    if INVERSE:
        sin = -sin
    _turn(
        Q + batch * q_batch + position * q_position, Q_OUT + batch * q_out_batch + position * q_out_position,
        q_heads, q_out_heads, heads, cos, sin, half, width, FROM, TO, HEADS, HALF, REST,
    )  # fmt: skip
    _turn(
        K + batch * k_batch + position * k_position, K_OUT + batch * k_out_batch + position * k_out_position,
        k_heads, k_out_heads, key_heads, cos, sin, half, width, FROM, TO, KEY_HEADS, HALF, REST,
    )  # fmt: skip


def rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool, apart: bool = False
) -> tuple[Tensor, Tensor]:
    outs = torch.empty_like(q), torch.empty_like(k)
    dense = [x if x.stride(-1) == 1 else torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in outs]
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    cos, sin = cos.contiguous(), sin.contiguous()
    batch, heads, positions, width = q.shape
    half = cos.shape[-1]
    block = power_of_two(half)
    together = max(1, _PAIRS // block)
    launch(
        _rotary, batch * positions, q, k, cos, sin, *dense,
        *(stride for x in (q, k, *dense) for stride in x.stride()[:-1]),
        cos.stride(0) if len(cos) > 1 else 0, cos.stride(1), heads, k.shape[1], positions, half, width,
        warps=_WARPS, FROM=interleaved and not (apart and inverse), TO=interleaved and (inverse or not apart),
        INVERSE=inverse,
        HEADS=min(together, power_of_two(heads)), KEY_HEADS=min(together, power_of_two(k.shape[1])),
        HALF=block, REST=power_of_two(width - 2 * half) if width > 2 * half else 0,
    )  # fmt: skip
    q_out, k_out = (out if out is made else out.copy_(made) for out, made in zip(outs, dense, strict=True))
    return q_out, k_out
