"""Attention pair by pair, to hold kernels to."""

import math
from typing import Any

import torch

from tests.support.kernels import assert_near


def read_pairs(
    queries: int, keys: int, causal: bool = False, window: int | None = None, starts: Any = (), key_starts: Any = ()
) -> torch.Tensor:
    """Which keys each query reads, of every pair."""
    starts, key_starts = starts or (0, queries), key_starts or starts or (0, keys)
    read = torch.zeros(queries, keys, dtype=torch.bool)
    for begin, end, key_begin, key_end in zip(starts, starts[1:], key_starts, key_starts[1:], strict=False):
        to_end, key_to_end = torch.arange(end - begin, 0, -1), torch.arange(key_end - key_begin, 0, -1)
        behind = key_to_end - to_end[:, None]  # how far the key is before the one beside the query
        is_near = behind.abs() < window if window is not None else behind.abs() >= 0
        read[begin:end, key_begin:key_end] = is_near & (behind >= 0) if causal else is_near
    return read


def masked_softmax(*tensors: torch.Tensor) -> torch.Tensor:
    """Of q, k, v and which keys each query reads: every pair is computed; zeros where a query reads no key."""
    q, k, v, read = tensors
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    weights = scores.masked_fill(~read, -torch.inf).softmax(-1)
    return weights.masked_fill(~read, 0) @ v


def projections(
    batch: int, heads: int, key_heads: int, queries: int, keys: int, width: int, dtype: torch.dtype = torch.float32
) -> list[torch.Tensor]:
    """As projections of a model give them: in memory heads come behind positions."""
    shapes = ((batch, queries, heads, width), *[(batch, keys, key_heads, width)] * 2)
    return [torch.randn(shape).to(dtype).transpose(1, 2) for shape in shapes]


def assert_together(found: list[torch.Tensor], wanted: list[torch.Tensor], factor: float = 1.0) -> None:
    """All tensors are near the wanted ones, of the largest element of any: a gradient may be nothing but rounding."""
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape
    assert_near([torch.cat([x.flatten() for x in found])], [torch.cat([x.flatten() for x in wanted])], factor)
