"""Causal attention of the rows that one rank of a folded sequence has; what `ir.context` means by it.

The sequence is cut into twice as many chunks as there are ranks; rank r has chunks r and 2 * ranks - 1 - r. A chunk of
queries attends to the chunk of keys in its own place up to the diagonal, to each before it in full and to none behind
it, so that every rank does 2 * ranks - 1 full pairs of chunks and two half ones. What a chunk gets of each pair is
merged by the logarithms of the sums of exponentials (Milakov and Gimelshein 2018; Dao et al. 2022, FlashAttention,
arXiv:2205.14135). No more than a pair of chunks is in work at a time, as in ring attention (Liu et al. 2023,
arXiv:2310.01889).
"""

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class FoldedAttention:
    """Of rank `rank` of `ranks`. scale: of the scores; None for one over the root of the width."""

    rank: int
    ranks: int
    scale: float | None

    def forward(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The result, and its logarithms of sums.

        query: [batch, heads, rows, width]. keys, values: [ranks * batch, key heads, rows, width], of all ranks. Returns
        [batch, heads, rows, width] in the dtype of the query, and [batch, heads, rows] at least in float32.
        """
        results, sums = zip(*(self._of_chunk(*own, keys, values) for own in self._own(query)), strict=True)
        return torch.cat(results, 2).to(query.dtype), torch.cat(sums, 2)

    def backward(
        self,
        gradient: torch.Tensor,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        result: torch.Tensor,
        sums: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The gradients of query, keys and values; those of the last two are this rank's summands.

        Kernels are given the merged result and sums, from which each pair's share of the softmax follows exactly.
        """
        of_query: list[torch.Tensor] = []
        of_keys: list[torch.Tensor | None] = [None] * (2 * self.ranks)
        of_values: list[torch.Tensor | None] = [None] * (2 * self.ranks)
        for (own, place), (g, _), (out, _), (logs, _) in zip(
            *map(self._own, (query, gradient, result, sums)), strict=True
        ):
            total = None
            for at in range(place + 1):
                pair = own, self._chunk(keys, at), self._chunk(values, at)
                each = attention_backward(g, *pair, out, logs, at == place, self.scale)
                total = _sum(total, each[0].to(sums.dtype))
                of_keys[at], of_values[at] = _sum(of_keys[at], each[1]), _sum(of_values[at], each[2])
            assert total is not None
            of_query.append(total)
        return torch.cat(of_query, 2).to(query.dtype), self._by_rank(of_keys), self._by_rank(of_values)

    def _of_chunk(
        self, query: torch.Tensor, place: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the queries of one chunk get of all keys that they may see."""
        result, sums = attention(query, self._chunk(keys, place), self._chunk(values, place), True, self.scale)
        result = result.to(sums.dtype)
        for at in range(place):
            other, its = attention(query, self._chunk(keys, at), self._chunk(values, at), False, self.scale)
            total = torch.logaddexp(sums, its)
            result = result * (sums - total).exp().unsqueeze(-1) + other * (its - total).exp().unsqueeze(-1)
            sums = total
        return result, sums

    def _own(self, x: torch.Tensor) -> list[tuple[torch.Tensor, int]]:
        """The rank's chunks, with their numbers."""
        return list(zip(x.chunk(2, 2), (self.rank, 2 * self.ranks - 1 - self.rank), strict=True))

    def _chunk(self, x: torch.Tensor, number: int) -> torch.Tensor:
        """A chunk of what was gathered."""
        rank, half = (number, 0) if number < self.ranks else (2 * self.ranks - 1 - number, 1)
        return x.chunk(self.ranks)[rank].chunk(2, 2)[half]

    def _by_rank(self, chunks: list[torch.Tensor | None]) -> torch.Tensor:
        """The inverse of `_chunk`; zeros for chunks that nothing came to."""
        some = chunks[0]
        assert some is not None
        filled = [torch.zeros_like(some) if chunk is None else chunk for chunk in chunks]
        return torch.cat([torch.cat([filled[rank], filled[-1 - rank]], 2) for rank in range(self.ranks)])


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool, scale: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """[b, h, s, d], [b, g, t, d], [b, g, t, d] -> [b, h, s, d], and [b, h, s] of logarithms of sums."""
    kernels = torch.ops.aten
    if query.device.type == "cpu":
        result, sums = kernels._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal, scale=scale)
        return result, sums
    if _is_for_flash(query):
        result, sums, *_ = kernels._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, scale=scale)
        return result, sums
    return plain_attention(query, key, value, causal, scale)


def attention_backward(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    result: torch.Tensor,
    sums: torch.Tensor,
    causal: bool,
    scale: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of query, key and value, where `result` and `sums` may be of more keys than these."""
    kernels = torch.ops.aten
    given = gradient, query, key, value, result
    if query.device.type == "cpu":
        backward = kernels._scaled_dot_product_flash_attention_for_cpu_backward
        of_query, of_key, of_value = backward(*given, sums, 0.0, causal, scale=scale)
    elif _is_for_flash(query):
        backward = kernels._scaled_dot_product_flash_attention_backward
        no_state = [torch.empty(size, dtype=torch.uint64, device=query.device) for size in ((2,), ())]
        lengths = query.shape[2], key.shape[2]
        of_query, of_key, of_value = backward(
            *given, sums.contiguous(), None, None, *lengths, 0.0, causal, *no_state, scale=scale
        )
    else:
        of_query, of_key, of_value = plain_attention_backward(*given, sums, causal, scale)
    return of_query, of_key, of_value


def plain_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool, scale: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `attention`, without a fused kernel: the scores of all pairs are in memory, in float32 at least."""
    scores, _ = _scores(query, key, causal, scale)
    sums = scores.logsumexp(-1)
    result = (scores - sums.unsqueeze(-1)).exp() @ _wide(value, query).to(scores.dtype)
    return result.to(query.dtype), sums


def plain_attention_backward(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    result: torch.Tensor,
    sums: torch.Tensor,
    causal: bool,
    scale: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `attention_backward`: the softmax is made again from scores and sums (Dao et al. 2022, algorithm 4)."""
    scores, factor = _scores(query, key, causal, scale)
    wide = scores.dtype
    shares, g = (scores - sums.unsqueeze(-1)).exp(), gradient.to(wide)
    means = (g * result.to(wide)).sum(-1, keepdim=True)
    of_scores = shares * (g @ _wide(value, query).to(wide).mT - means) * factor
    of_query = of_scores @ _wide(key, query).to(wide)
    of_key, of_value = (
        total.unflatten(1, (key.shape[1], -1)).sum(2).to(key.dtype)
        for total in (of_scores.mT @ query.to(wide), shares.mT @ g)
    )
    return of_query.to(query.dtype), of_key, of_value


def _scores(query: torch.Tensor, key: torch.Tensor, causal: bool, scale: float | None) -> tuple[torch.Tensor, float]:
    """[b, h, s, t], minus infinity where a query does not see a key; and the factor in them."""
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = query.to(wide) @ _wide(key, query).to(wide).mT * factor
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(hidden, -math.inf)
    return scores, factor


def _wide(x: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """As many heads as the query has."""
    return x.repeat_interleave(query.shape[1] // x.shape[1], 1)


def _is_for_flash(query: torch.Tensor) -> bool:
    """Whether CUDA's kernel takes such dtypes and widths."""
    is_short = query.dtype in (torch.float16, torch.bfloat16)
    return query.device.type == "cuda" and is_short and query.shape[-1] % 8 == 0 and query.shape[-1] <= 256


def _sum(total: torch.Tensor | None, more: torch.Tensor) -> torch.Tensor:
    return more if total is None else total + more
