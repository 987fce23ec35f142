"""Which keys a query reads: an interval of them, and with a layout those of some blocks alone.

Sequences are packed one behind another: starts has where each begins, and where the last ends. A query stands beside a
key: the last of its sequence beside the last key of it, as when what was generated before is kept. It reads the keys
from `before` ahead of that one to `after` behind it, as far as its sequence goes; None: no bound. Neither bound of the
interval falls from a query to the next, so that the queries that read a key are an interval too, which the same
function gives, with all arguments in each other's place.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Reach(NamedTuple):
    """How many keys before the one beside it a query reads, and how many behind it; None: all."""

    before: int | None
    after: int | None

    @property
    def turned(self) -> "Reach":
        """That of keys: the queries that read them."""
        return Reach(self.after, self.before)


def reach(causal: bool, window: int | None) -> Reach:
    """window: keys on a side, with the one beside the query."""
    side = None if window is None else window - 1
    return Reach(side, 0 if causal else side)


class Mask(NamedTuple):
    """What decides which pairs `attention` reads, and the scale of scores, as `reference` tells them."""

    starts: Tensor | None
    key_starts: Tensor | None
    causal: bool
    window: int | None
    scale: float

    @property
    def reach(self) -> Reach:
        return reach(self.causal, self.window)


class Blocks(NamedTuple):
    """What decides which pairs `sparse_attention` reads, and the scale of scores, as `reference` tells them."""

    row_offsets: Tensor
    row_blocks: Tensor
    column_offsets: Tensor
    column_blocks: Tensor
    block: int
    causal: bool
    scale: float

    @property
    def reach(self) -> Reach:
        return reach(self.causal, None)


def intervals(
    own: int, other: int, own_starts: Tensor | None, other_starts: Tensor | None, reach: Reach, device: torch.device
) -> tuple[Tensor, Tensor]:
    """For each of `own` positions the first of `other` that it reads, and the one behind the last: int32 [own].

    It reads none where the second is not larger.
    """
    at = torch.arange(own, device=device)
    if own_starts is None or other_starts is None:
        begin, end = torch.zeros((), dtype=at.dtype, device=device), at.new_full((), other)
        beside = at + (other - own)
    else:
        sequence = torch.searchsorted(own_starts.to(at.dtype), at, right=True).clamp_(1, len(own_starts) - 1)
        begin, end = other_starts[sequence - 1].to(at.dtype), other_starts[sequence].to(at.dtype)
        beside = at + (end - own_starts[sequence])
    first = begin if reach.before is None else torch.maximum(begin, beside - reach.before)
    last = end if reach.after is None else torch.minimum(end, beside + (reach.after + 1))
    first, last = (bound.clamp(0, other).to(torch.int32).expand(own) for bound in (first, last))
    return first.contiguous(), last.contiguous()


def pairs(queries: int, keys: int, reach: Reach) -> int:
    """How many pairs of a query and a key that it reads there are, in one sequence."""
    first, last = intervals(queries, keys, None, None, reach, torch.device("cpu"))
    return int((last - first).clamp_(min=0).sum())
