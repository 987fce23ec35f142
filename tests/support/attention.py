"""Attention pair by pair, to hold kernels to."""

import math

import torch


def read_pairs(queries, keys, causal=False, window=None, starts=(), key_starts=()) -> torch.Tensor:
    """Which keys each query reads, pair by pair."""
    starts, key_starts = starts or (0, queries), key_starts or starts or (0, keys)
    read = torch.zeros(queries, keys, dtype=torch.bool)
    for begin, end, key_begin, key_end in zip(starts, starts[1:], key_starts, key_starts[1:], strict=False):
        for query in range(begin, end):
            for key in range(key_begin, key_end):
                behind = (key_end - key) - (end - query)  # how far the key is before the one beside the query
                is_near = window is None or abs(behind) < window
                read[query, key] = is_near and not (causal and behind < 0)
    return read


def masked_softmax(q, k, v, read, scale=None) -> torch.Tensor:
    """Every pair is computed; zeros where a query reads no key."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q @ k.mT * (scale or 1 / math.sqrt(q.shape[-1]))
    weights = scores.masked_fill(~read, -torch.inf).softmax(-1)
    return weights.masked_fill(~read, 0) @ v


def projections(batch, heads, key_heads, queries, keys, width, dtype=torch.float32) -> list[torch.Tensor]:
    """As projections of a model give them: in memory heads come behind positions."""
    shapes = ((batch, queries, heads, width), *[(batch, keys, key_heads, width)] * 2)
    return [torch.randn(shape).to(dtype).transpose(1, 2) for shape in shapes]
