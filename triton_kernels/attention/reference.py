"""Attention in operators of torch, in float32 or, of float64, in float64; what no query of a part reads is left out.

q: [batch, heads, queries, width]; k, v: [batch, key heads, keys, width], of any strides. Key heads divide heads: as
many in turn share one. With the keys that query i reads, as `masks` says:

    out_i = sum over j of softmax over j (scale * q_i . k_j) * v_j

and lse, [batch, heads, queries], is the logarithm of the sum of exponentials. A query that reads no key gives zeros and
has lse inf, so that exp(score - lse) is the weight of a pair anywhere. Results lie in memory as [batch, queries, heads,
width]. lse is at least of float32.

    attention           causal: of keys behind the one beside it a query reads none. window: as `masks.reach` has it.
                        starts, key_starts: of packed sequences, int32 or int64 [sequences + 1], then batch is one.
    sparse_attention    blocks of `block` queries read the blocks of keys that lists name, by rows and by columns
                        (`layouts.lists`), for each head or for all.

Derivatives are those of Dao et al. 2022 (arXiv:2205.14135, B.2): of lse no gradient is taken.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from graphopt.triton_kernels.attention.masks import Blocks, Mask, intervals

_ROWS = 128  # queries of a part


class _Part(NamedTuple):
    """Queries that are computed at once, with the keys that any of them reads, of all heads or of all key heads.

    keys: int64 [heads, count], places in all rows of keys, head by head. read: bool [heads or 1, queries, count].
    """

    queries: slice
    keys: Tensor
    read: Tensor


def empty_like(x: Tensor) -> Tensor:
    """Uninitialized, of the shape of `x`, [batch, heads, positions, width]; in memory heads come behind positions."""
    batch, heads, positions, width = x.shape
    return x.new_empty(batch, positions, heads, width).transpose(1, 2)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
    return _forward(q, k, v, mask.scale, _dense_parts(q, k, mask))


def attention_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Mask
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v. gradient: of out."""
    return _backward(gradient, q, k, v, out, lse, mask.scale, _dense_parts(q, k, mask))


def sparse_attention(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor]:
    return _forward(q, k, v, blocks.scale, _sparse_parts(q, k, blocks))


def sparse_attention_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, blocks: Blocks
) -> tuple[Tensor, Tensor, Tensor]:
    return _backward(gradient, q, k, v, out, lse, blocks.scale, _sparse_parts(q, k, blocks))


def _dense_parts(q: Tensor, k: Tensor, mask: Mask) -> Iterator[_Part]:
    queries, keys = q.shape[2], k.shape[2]
    first, last = intervals(queries, keys, mask.starts, mask.key_starts, mask.reach, q.device)
    heads = torch.arange(k.shape[1], device=q.device)[:, None] * keys
    bounds = [each for part in range(0, queries, _ROWS) for each in (first[part], last[part:][:_ROWS][-1])]
    extents = torch.stack(bounds).view(-1, 2).tolist() if bounds else []  # waits for a device once
    for index, (begin, end) in enumerate(extents):
        rows = slice(index * _ROWS, (index + 1) * _ROWS)
        at = torch.arange(begin, max(begin, end), device=q.device)
        yield _Part(rows, heads + at, _between(at[None], first[rows], last[rows]))


def _sparse_parts(q: Tensor, k: Tensor, listed: Blocks) -> Iterator[_Part]:
    """One for each row of blocks; heads that read fewer than others are filled up with what is not read."""
    queries, keys = q.shape[2], k.shape[2]
    offsets, blocks, block = listed.row_offsets, listed.row_blocks, listed.block
    first, last = intervals(queries, keys, None, None, listed.reach, q.device)
    heads, rows = offsets.shape[0], offsets.shape[1] - 1
    shared = q.shape[1] // k.shape[1]
    owners = torch.arange(k.shape[1], device=q.device) if heads == 1 else torch.arange(heads, device=q.device) // shared
    counts = offsets.diff()
    most = counts.amax(0).tolist() if rows else []
    within = torch.arange(block, device=q.device)
    for row in range(rows):
        queries_of_row = slice(row * block, (row + 1) * block)
        place = torch.arange(most[row], device=q.device)
        is_listed = place < counts[:, row, None]
        named = (offsets[:, row, None] + place).clamp(max=max(0, len(blocks) - 1)).masked_fill(~is_listed, 0)
        column = blocks[named.long()].long() if len(blocks) else named.long()
        at = (column[..., None] * block + within).flatten(1)
        is_listed = is_listed.repeat_interleave(block, 1) & (at < keys)
        at = at.masked_fill(~is_listed, 0)
        read = _between(at, first[queries_of_row], last[queries_of_row]) & is_listed[:, None]
        yield _Part(queries_of_row, owners[:, None] * keys + at, read)


def _between(at: Tensor, first: Tensor, last: Tensor) -> Tensor:
    """[heads, count], [queries], [queries] -> [heads, queries, count]"""
    return (at[:, None] >= first[:, None]) & (at[:, None] < last[:, None])


def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float, parts: Iterator[_Part]) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    out, lse = empty_like(q), q.new_empty(q.shape[:3], dtype=wide)
    all_keys, all_values = (x.to(wide).flatten(1, 2) for x in (k, v))
    for part in parts:
        rows = q[:, :, part.queries].to(wide)
        fold = _folding(part)
        scores = _scores(fold(rows), _rows(all_keys, part), part, scale)
        sums = scores.logsumexp(-1, keepdim=True)
        sums = sums.masked_fill_(sums == -torch.inf, torch.inf)
        weights = scores.sub_(sums).exp_()
        out[:, :, part.queries] = (weights @ _rows(all_values, part)).view(rows.shape).to(q.dtype)
        lse[:, :, part.queries] = sums.view(rows.shape[:3])
    return out, lse


def _backward(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    parts: Iterator[_Part],
) -> tuple[Tensor, Tensor, Tensor]:
    wide = lse.dtype
    of_q = empty_like(q)
    of_k, of_v = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (k, v))
    all_keys, all_values = (x.to(wide).flatten(1, 2) for x in (k, v))
    for part in parts:
        rows, of_rows, out_rows = (x[:, :, part.queries].to(wide) for x in (q, gradient, out))
        fold = _folding(part)
        queries, of_out, keys, values = fold(rows), fold(of_rows), _rows(all_keys, part), _rows(all_values, part)
        weights = _scores(queries, keys, part, scale).sub_(fold(lse[:, :, part.queries, None])).exp_()
        along = fold((of_rows * out_rows).sum(-1, keepdim=True))
        of_scores = (of_out @ values.mT).sub_(along).mul_(weights).mul_(scale)
        of_q[:, :, part.queries] = (of_scores @ keys).view(rows.shape).to(q.dtype)
        for total, found in ((of_k, of_scores.mT @ queries), (of_v, weights.mT @ of_out)):
            total.flatten(1, 2).index_add_(1, part.keys.flatten(), found.flatten(1, 2))
    return of_q, empty_like(k).copy_(of_k), empty_like(v).copy_(of_v)


def _folding(part: _Part) -> Callable[[Tensor], Tensor]:
    """Queries that share keys one behind another: [batch, heads, queries, width] -> [batch, key heads, ..., width]."""
    heads = len(part.keys)
    return lambda x: x.reshape(len(x), heads, x.shape[1] // heads * x.shape[2], x.shape[3])


def _rows(x: Tensor, part: _Part) -> Tensor:
    """The keys or values of a part, [batch, heads, count, width], of all, [batch, key heads * keys, width]."""
    return x.index_select(1, part.keys.flatten()).view(len(x), *part.keys.shape, x.shape[-1])


def _scores(queries: Tensor, keys: Tensor, part: _Part, scale: float) -> Tensor:
    """Those of folded queries; -inf where a key is not read."""
    scores = (queries @ keys.mT).mul_(scale)
    return scores.masked_fill_(~part.read.repeat(1, queries.shape[2] // part.read.shape[1], 1), -torch.inf)
