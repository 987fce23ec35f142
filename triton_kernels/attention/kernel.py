"""Attention on a GPU; functions have the arguments and results of those in `reference`.

As Dao 2023 (FlashAttention-2, arXiv:2307.08691): a program of `_forward` and of `_queries_backward` holds a tile of
queries and walks over the keys that these read, one of `_keys_backward` a tile of keys and walks over the queries that
read them, of all heads that share it, so that nothing is added to by several. Tiles that are read whole take no mask;
what is not read is skipped. The sum of each row of gradient * out, which both backward kernels need, is found by the
first, which reads both anyway. Exponentials are of two.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphopt.triton_kernels import _triton
from graphopt.triton_kernels.attention.masks import Blocks, Mask, Reach, intervals
from graphopt.triton_kernels.attention.reference import empty_like
from graphopt.triton_kernels.launch import launch, power_of_two

_LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


class _Tile(NamedTuple):
    """own: rows that a program holds; other: those that it reads at a step, of which `stages` are under way."""

    own: int
    other: int
    warps: int
    stages: int


# By the width of a row, to a power of two: the largest that do not spill (resources.json). First those of two bytes.
_FORWARD = (
    {32: _Tile(128, 64, 4, 3), 64: _Tile(128, 64, 4, 3), 128: _Tile(128, 32, 8, 3), 256: _Tile(64, 32, 8, 2)},
    {32: _Tile(64, 32, 4, 2), 64: _Tile(32, 32, 4, 2), 128: _Tile(32, 32, 8, 2)},
)
_QUERIES_BACKWARD = (
    {32: _Tile(128, 64, 8, 3), 64: _Tile(128, 64, 8, 2), 128: _Tile(128, 32, 8, 2), 256: _Tile(64, 32, 8, 2)},
    {32: _Tile(64, 32, 4, 2), 64: _Tile(32, 32, 8, 2), 128: _Tile(16, 16, 4, 1)},
)
_KEYS_BACKWARD = (
    {32: _Tile(128, 64, 8, 2), 64: _Tile(128, 32, 8, 2), 128: _Tile(64, 64, 8, 1), 256: _Tile(32, 32, 8, 1)},
    {32: _Tile(32, 16, 4, 2), 64: _Tile(32, 32, 8, 2), 128: _Tile(16, 32, 8, 1)},
)
_LEAST_WIDTH = 16  # of a product
_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@triton.jit
def _read(
    X,
    first,
    count,
    stride,
    width: tl.constexpr,
    MASKED: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    OF: tl.constexpr,
):
    """Rows `first` and those behind it; where MASKED, zeros behind the last of `count`."""
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    at = X + tl.cast(first, tl.int64) * stride + row * stride + column
    if width < WIDTH:
        inside = column < width
        if MASKED:
            inside = inside & (first + row < count)
        x = tl.load(at, mask=inside, other=0.0)
    elif MASKED:
        x = tl.load(at, mask=first + row < count, other=0.0)
    else:
        x = tl.load(at)
    return x.to(OF)


@triton.jit
def _write(X, x, first, count, stride, width: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    at = X + tl.cast(first, tl.int64) * stride + row * stride + column
    tl.store(at, x.to(X.dtype.element_ty), mask=(first + row < count) & (column < width))


@triton.jit
def _extent(FIRST, LAST, own, count, TILE: tl.constexpr):
    """Of what rows `own` read: each one's interval; where it begins and ends for any, and from where to where all of it
    is read, both in whole tiles."""
    inside = own < count
    low = tl.load(FIRST + own, mask=inside, other=0)
    high = tl.load(LAST + own, mask=inside, other=0)
    begin = tl.min(tl.where(inside, low, 1 << 30), axis=0) // TILE * TILE
    end = tl.maximum(tl.max(high, axis=0), begin)
    whole = tl.cdiv(tl.max(low, axis=0), TILE) * TILE
    whole = tl.minimum(tl.maximum(whole, begin), tl.cdiv(end, TILE) * TILE)
    whole_end = tl.maximum(tl.min(tl.where(inside, high, 1 << 30), axis=0) // TILE * TILE, whole)
    return low, high, begin, whole, whole_end, end


@triton.jit
def _row(tile, OWN: tl.constexpr, BLOCK: tl.constexpr):
    """Of a layout, that of a tile."""
    return tile * OWN // BLOCK if BLOCK > 0 else tile


@triton.jit
def _steps(OFFSETS, row, begin, whole, whole_end, end, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """From which to which step tiles are read with a mask: those listed, or those before and behind what is whole."""
    if BLOCK > 0:
        from_step = tl.load(OFFSETS + row) * (BLOCK // TILE)
        to_step = tl.load(OFFSETS + row + 1) * (BLOCK // TILE)
    else:
        from_step = 0
        to_step = (whole - begin) // TILE + tl.cdiv(end - whole_end, TILE)
    return from_step, to_step


@triton.jit
def _place(BLOCKS, step, begin, whole, whole_end, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """Where the tile of a step begins."""
    if BLOCK > 0:
        first = tl.load(BLOCKS + step // (BLOCK // TILE)) * BLOCK + step % (BLOCK // TILE) * TILE
    else:
        before = (whole - begin) // TILE
        first = tl.where(step < before, begin + step * TILE, whole_end + (step - before) * TILE)
    return first


@triton.jit
def _attend(
    q, K, V, first, keys, low, high, k_stride, v_stride, width: tl.constexpr, scale, out, total, largest,
    MASKED: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr, OF: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What is known of queries, with a tile of keys more (Milakov and Gimelshein 2018, arXiv:1805.02867)."""
    k = _read(K, first, keys, k_stride, width, MASKED, TILE, WIDTH, OF)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if MASKED:
        key = first + tl.arange(0, TILE)[None, :]
        scores = tl.where((key >= low[:, None]) & (key < high[:, None]), scores, float("-inf"))
    now = tl.maximum(largest, tl.max(scores, axis=1) * scale)
    base = tl.where(now == float("-inf"), 0.0, now)
    weights = tl.exp2(scores * scale - base[:, None])
    rescale = tl.exp2(largest - base)
    v = _read(V, first, keys, v_stride, width, MASKED, TILE, WIDTH, OF)
    out = tl.dot(weights.to(OF), v, out * rescale[:, None], input_precision=PRECISION)
    return out, total * rescale + tl.sum(weights, axis=1), now


@triton.jit
def _forward(
    Q, K, V, OUT, LSE, FIRST, LAST, OFFSETS, BLOCKS,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, out_batch, out_head, out_row,
    heads, shared, queries, keys, width: tl.constexpr, scale, list_stride,
    BLOCK: tl.constexpr, OWN: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr,
    OF: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(queries, OWN)
    tile = tiles - 1 - tl.program_id(0) % tiles  # the last read most, where attention is causal
    pair = tl.program_id(0) // tiles
    batch, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    own = tile * OWN + tl.arange(0, OWN)
    low, high, begin, whole, whole_end, end = _extent(FIRST, LAST, own, queries, TILE)
    q = _read(Q + batch * q_batch + head * q_head, tile * OWN, queries, q_row, width, True, OWN, WIDTH, OF)
    K += batch * k_batch + head // shared * k_head
    V += batch * v_batch + head // shared * v_head
    out = tl.zeros((OWN, WIDTH), dtype=tl.float32)
    total = tl.zeros((OWN,), dtype=tl.float32)
    largest = tl.full((OWN,), float("-inf"), dtype=tl.float32)
    scale2 = scale * _LOG2_E
    if BLOCK == 0:
        for first in range(whole, whole_end, TILE):
            out, total, largest = _attend(q, K, V, first, keys, low, high, k_row, v_row, width, scale2, out, total,
                                          largest, False, TILE, WIDTH, OF, PRECISION)  # fmt: skip
    at = head * list_stride + _row(tile, OWN, BLOCK)
    from_step, to_step = _steps(OFFSETS, at, begin, whole, whole_end, end, TILE, BLOCK)
    for step in range(from_step, to_step):
        first = _place(BLOCKS, step, begin, whole, whole_end, TILE, BLOCK)
        out, total, largest = _attend(q, K, V, first, keys, low, high, k_row, v_row, width, scale2, out, total,
                                      largest, True, TILE, WIDTH, OF, PRECISION)  # fmt: skip
    has_none = total == 0.0
    out = out / tl.where(has_none, 1.0, total)[:, None]
    lse = tl.where(has_none, float("inf"), (largest + tl.log2(total)) / _LOG2_E)
    tl.store(LSE + pair.to(tl.int64) * queries + own, lse, mask=own < queries)
    _write(OUT + batch * out_batch + head * out_head, out, tile * OWN, queries, out_row, width, OWN, WIDTH)


@triton.jit
def _descend_queries(
    q, of_out, K, V, first, keys, low, high, k_stride, v_stride, width: tl.constexpr, scale, lse, along, of_q,
    MASKED: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr, OF: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of queries, with that from a tile of keys more."""
    k = _read(K, first, keys, k_stride, width, MASKED, TILE, WIDTH, OF)
    v = _read(V, first, keys, v_stride, width, MASKED, TILE, WIDTH, OF)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    weights = tl.exp2(scores * scale - lse[:, None])
    if MASKED:
        key = first + tl.arange(0, TILE)[None, :]
        weights = tl.where((key >= low[:, None]) & (key < high[:, None]), weights, 0.0)
    of_scores = weights * (tl.dot(of_out, tl.trans(v), input_precision=PRECISION) - along[:, None])
    return tl.dot(of_scores.to(OF), k, of_q, input_precision=PRECISION)


@triton.jit
def _queries_backward(
    GRADIENT, Q, K, V, OUT, LSE, ALONG, OF_Q, FIRST, LAST, OFFSETS, BLOCKS,
    gradient_batch, gradient_head, gradient_row, q_batch, q_head, q_row, k_batch, k_head, k_row,
    v_batch, v_head, v_row, out_batch, out_head, out_row, of_q_batch, of_q_head, of_q_row,
    heads, shared, queries, keys, width: tl.constexpr, scale, list_stride,
    BLOCK: tl.constexpr, OWN: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr,
    OF: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(queries, OWN)
    tile = tiles - 1 - tl.program_id(0) % tiles
    pair = tl.program_id(0) // tiles
    batch, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    own = tile * OWN + tl.arange(0, OWN)
    low, high, begin, whole, whole_end, end = _extent(FIRST, LAST, own, queries, TILE)
    of_out = _read(GRADIENT + batch * gradient_batch + head * gradient_head, tile * OWN, queries, gradient_row, width,
                   True, OWN, WIDTH, OF)  # fmt: skip
    out = _read(OUT + batch * out_batch + head * out_head, tile * OWN, queries, out_row, width, True, OWN, WIDTH,
                tl.float32)  # fmt: skip
    along = tl.sum(of_out.to(tl.float32) * out, axis=1)
    of_row = pair.to(tl.int64) * queries + own
    tl.store(ALONG + of_row, along, mask=own < queries)
    lse = tl.load(LSE + of_row, mask=own < queries, other=float("inf")) * _LOG2_E
    q = _read(Q + batch * q_batch + head * q_head, tile * OWN, queries, q_row, width, True, OWN, WIDTH, OF)
    K += batch * k_batch + head // shared * k_head
    V += batch * v_batch + head // shared * v_head
    of_q = tl.zeros((OWN, WIDTH), dtype=tl.float32)
    scale2 = scale * _LOG2_E
    if BLOCK == 0:
        for first in range(whole, whole_end, TILE):
            of_q = _descend_queries(q, of_out, K, V, first, keys, low, high, k_row, v_row, width, scale2, lse, along,
                                    of_q, False, TILE, WIDTH, OF, PRECISION)  # fmt: skip
    at = head * list_stride + _row(tile, OWN, BLOCK)
    from_step, to_step = _steps(OFFSETS, at, begin, whole, whole_end, end, TILE, BLOCK)
    for step in range(from_step, to_step):
        first = _place(BLOCKS, step, begin, whole, whole_end, TILE, BLOCK)
        of_q = _descend_queries(q, of_out, K, V, first, keys, low, high, k_row, v_row, width, scale2, lse, along, of_q,
                                True, TILE, WIDTH, OF, PRECISION)  # fmt: skip
    _write(OF_Q + batch * of_q_batch + head * of_q_head, of_q * scale, tile * OWN, queries, of_q_row, width, OWN, WIDTH)


@triton.jit
def _descend_keys(
    k, v, Q, GRADIENT, LSE, ALONG, first, queries, low, high, q_stride, gradient_stride, width: tl.constexpr, scale,
    of_k, of_v,
    TILE: tl.constexpr, WIDTH: tl.constexpr, OF: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of keys and values, with those from a tile of queries more."""
    q = _read(Q, first, queries, q_stride, width, True, TILE, WIDTH, OF)
    query = first + tl.arange(0, TILE)
    inside = query < queries
    lse = tl.load(LSE + query, mask=inside, other=float("inf")) * _LOG2_E
    along = tl.load(ALONG + query, mask=inside, other=0.0)
    weights = tl.exp2(tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale - lse[None, :])
    weights = tl.where((query[None, :] >= low[:, None]) & (query[None, :] < high[:, None]), weights, 0.0)
    of_out = _read(GRADIENT, first, queries, gradient_stride, width, True, TILE, WIDTH, OF)
    of_v = tl.dot(weights.to(OF), of_out, of_v, input_precision=PRECISION)
    of_scores = weights * (tl.dot(v, tl.trans(of_out), input_precision=PRECISION) - along[None, :])
    return tl.dot(of_scores.to(OF), q, of_k, input_precision=PRECISION), of_v


@triton.jit
def _keys_backward(
    GRADIENT, Q, K, V, LSE, ALONG, OF_K, OF_V, FIRST, LAST, OFFSETS, BLOCKS,
    gradient_batch, gradient_head, gradient_row, q_batch, q_head, q_row, k_batch, k_head, k_row,
    v_batch, v_head, v_row, of_k_batch, of_k_head, of_k_row, of_v_batch, of_v_head, of_v_row,
    heads, shared, queries, keys, width: tl.constexpr, scale, list_stride,
    BLOCK: tl.constexpr, OWN: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr,
    OF: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(keys, OWN)
    tile = tl.program_id(0) % tiles  # the first are read most, where attention is causal
    key_heads = heads // shared
    batch = (tl.program_id(0) // tiles // key_heads).to(tl.int64)
    key_head = (tl.program_id(0) // tiles % key_heads).to(tl.int64)
    own = tile * OWN + tl.arange(0, OWN)
    # All tiles take a mask: with a loop for others, within that over heads, registers do not suffice.
    low, high, begin, _, _, end = _extent(FIRST, LAST, own, keys, TILE)
    k = _read(K + batch * k_batch + key_head * k_head, tile * OWN, keys, k_row, width, True, OWN, WIDTH, OF)
    v = _read(V + batch * v_batch + key_head * v_head, tile * OWN, keys, v_row, width, True, OWN, WIDTH, OF)
    of_k = tl.zeros((OWN, WIDTH), dtype=tl.float32)
    of_v = tl.zeros((OWN, WIDTH), dtype=tl.float32)
    scale2 = scale * _LOG2_E
    for head in range(key_head * shared, (key_head + 1) * shared):
        of_head = (batch * heads + head) * queries
        q_of_head = Q + batch * q_batch + head * q_head
        gradient_of_head = GRADIENT + batch * gradient_batch + head * gradient_head
        at = head * list_stride + _row(tile, OWN, BLOCK)
        from_step, to_step = _steps(OFFSETS, at, begin, begin, begin, end, TILE, BLOCK)
        for step in range(from_step, to_step):
            first = _place(BLOCKS, step, begin, begin, begin, TILE, BLOCK)
            of_k, of_v = _descend_keys(k, v, q_of_head, gradient_of_head, LSE + of_head, ALONG + of_head, first,
                                       queries, low, high, q_row, gradient_row, width, scale2, of_k, of_v,
                                       TILE, WIDTH, OF, PRECISION)  # fmt: skip
    _write(
        OF_K + batch * of_k_batch + key_head * of_k_head, of_k * scale, tile * OWN, keys, of_k_row, width, OWN, WIDTH
    )
    _write(OF_V + batch * of_v_batch + key_head * of_v_head, of_v, tile * OWN, keys, of_v_row, width, OWN, WIDTH)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
    return _attention(q, k, v, mask.scale, _Walk.over(q, k, mask.starts, mask.key_starts, mask.reach))


def attention_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Mask
) -> tuple[Tensor, Tensor, Tensor]:
    rows = _Walk.over(q, k, mask.starts, mask.key_starts, mask.reach)
    columns = _Walk.over(k, q, mask.key_starts, mask.starts, mask.reach.turned)
    return _backward(gradient, q, k, v, out, lse, mask.scale, rows, columns)


def sparse_attention(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor]:
    rows = _Walk.by(q, k, blocks.row_offsets, blocks.row_blocks, blocks.block, blocks.reach)
    return _attention(q, k, v, blocks.scale, rows)


def sparse_attention_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, blocks: Blocks
) -> tuple[Tensor, Tensor, Tensor]:
    rows = _Walk.by(q, k, blocks.row_offsets, blocks.row_blocks, blocks.block, blocks.reach)
    columns = _Walk.by(k, q, blocks.column_offsets, blocks.column_blocks, blocks.block, blocks.reach.turned)
    return _backward(gradient, q, k, v, out, lse, blocks.scale, rows, columns)


class _Walk(NamedTuple):
    """What programs read for their tiles: intervals, and where a layout says so, blocks alone.

    head_stride: of offsets from one head to the next; 0 where a layout is for all.
    """

    first: Tensor
    last: Tensor
    offsets: Tensor | None = None
    blocks: Tensor | None = None
    block: int = 0
    head_stride: int = 0

    @classmethod
    def over(
        cls, own: Tensor, other: Tensor, starts: Tensor | None, other_starts: Tensor | None, reach: Reach
    ) -> "_Walk":
        return cls(*intervals(own.shape[2], other.shape[2], starts, other_starts, reach, own.device))

    @classmethod
    def by(cls, own: Tensor, other: Tensor, offsets: Tensor, blocks: Tensor, block: int, reach: Reach) -> "_Walk":
        bounds = intervals(own.shape[2], other.shape[2], None, None, reach, own.device)
        stride = offsets.shape[1] if offsets.shape[0] > 1 else 0
        return cls(*bounds, offsets.contiguous(), blocks.contiguous(), block, stride)

    def tile(self, tile: _Tile) -> _Tile:
        """No larger than blocks are."""
        if not self.block:
            return tile
        own, other = min(tile.own, self.block), min(tile.other, self.block)
        warps = tile.warps if own == tile.own else min(tile.warps, own // 16)  # a warp takes 16 rows of a product
        return _Tile(own, other, warps, tile.stages)


def _attention(q: Tensor, k: Tensor, v: Tensor, scale: float, walk: _Walk) -> tuple[Tensor, Tensor]:
    out, lse = empty_like(q), torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    q, k, v = map(_dense, (q, k, v))
    _run(_forward, _FORWARD, q, (q, k, v, out, lse), q, k, scale, walk)
    return out, lse


def _backward(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    rows: _Walk,
    columns: _Walk,
) -> tuple[Tensor, Tensor, Tensor]:
    of_q, of_k, of_v = map(empty_like, (q, k, v))
    along = torch.empty_like(lse)
    gradient, q, k, v, out = map(_dense, (gradient, q, k, v, out))
    _run(_queries_backward, _QUERIES_BACKWARD, q, (gradient, q, k, v, out, lse, along, of_q), q, k, scale, rows)
    _run(_keys_backward, _KEYS_BACKWARD, k, (gradient, q, k, v, lse, along, of_k, of_v), q, k, scale, columns)
    return of_q, of_k, of_v


def _run(
    kernel: Any,
    tiles: tuple[dict[int, _Tile], ...],
    own: Tensor,
    tensors: tuple[Tensor, ...],
    q: Tensor,
    k: Tensor,
    scale: float,
    walk: _Walk,
) -> None:
    """Launch a program for each tile of `own`, of each head: strides are those of tensors that have a width."""
    _, heads, queries, width = q.shape
    block = max(_LEAST_WIDTH, power_of_two(width))
    tile = walk.tile(tiles[q.dtype == torch.float32][max(32, block)])
    dtype = tl.float32 if _triton.is_interpreting() else _DTYPES[q.dtype]
    launch(
        kernel, triton.cdiv(own.shape[2], tile.own) * own.shape[0] * own.shape[1], *tensors,
        walk.first, walk.last, walk.offsets, walk.blocks,
        *(stride for x in tensors if x.dim() == q.dim() for stride in x.stride()[:-1]),
        heads, heads // k.shape[1], queries, k.shape[2], width, scale, walk.head_stride,
        warps=tile.warps, num_stages=tile.stages, BLOCK=walk.block, OWN=tile.own, TILE=tile.other,
        WIDTH=block, OF=dtype, PRECISION="tf32x3" if q.dtype == torch.float32 else "tf32",
    )  # fmt: skip


def _dense(x: Tensor) -> Tensor:
    """Elements of a row side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()
