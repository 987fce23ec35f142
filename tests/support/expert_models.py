"""Models with experts whose tokens are sorted by expert, in several spellings."""

from typing import Any

import torch
import transformers.integrations.moe  # noqa: F401 (defines the product by group)
from torch import nn

WIDTH, HIDDEN = 16, 24


class Routed(nn.Module):
    """Tokens to the best of several experts, whose products run by group.

    favourite: an expert that all tokens go to first. dropped: whether the last expert's tokens are left out. spelling:
    how tokens are sorted and put back.
    """

    def __init__(
        self,
        experts: int,
        top: int = 2,
        favourite: int | None = None,
        dropped: bool = False,
        spelling: str = "sort",
        biased: bool = True,
    ) -> None:
        super().__init__()
        self.experts, self.top, self.favourite, self.dropped, self.spelling = experts, top, favourite, dropped, spelling
        self.router = nn.Linear(WIDTH, experts)
        self.up = nn.Parameter(torch.randn(experts, HIDDEN, WIDTH) / 4)
        self.down = nn.Parameter(torch.randn(experts, WIDTH, HIDDEN) / 5)
        self.bias = nn.Parameter(torch.randn(experts, HIDDEN) / 4) if biased else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.reshape(-1, WIDTH)
        scores = self.router(tokens).softmax(-1)
        preferred = scores if self.favourite is None else scores + nn.functional.one_hot(
            torch.full((len(tokens),), self.favourite), self.experts
        )  # fmt: skip
        _, ids = preferred.topk(self.top)
        weights = scores.gather(1, ids).reshape(-1)
        ids = ids.reshape(-1)
        sorted_ids, order = self._sorted(ids)
        kept = self.experts - self.dropped
        ends = torch.histc(sorted_ids.float(), kept, 0, kept - 1).cumsum(0, dtype=torch.int32)
        rows = tokens[order // self.top]
        grouped = torch.ops.transformers.grouped_mm_fallback
        out = grouped(rows, self.up[:kept].transpose(1, 2), ends)
        if self.bias is not None:
            out = out + self.bias[sorted_ids]
        out = grouped(out.relu(), self.down[:kept].transpose(1, 2), ends) * weights[order, None]
        if self.dropped:
            out = out.masked_fill((sorted_ids == kept)[:, None], 0)
        return self._put_back(out, order).view(-1, self.top, WIDTH).sum(1).view(x.shape)

    def _sorted(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.spelling == "argsort":
            order = ids.argsort(stable=True)
            return ids[order], order
        return ids.sort(stable=True)

    def _put_back(self, rows: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        if self.spelling == "argsort":
            return rows[order.argsort()]
        places = torch.empty_like(order)
        places[order] = torch.arange(len(order))
        return rows[places]


class Tower(nn.Module):
    """Routed blocks with a norm before each, and the loss of what comes out."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in blocks)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        for norm, block in zip(self.norms, self.blocks, strict=True):
            x = x + block(norm(x))
        return (x - y).square().mean()


def vectors(batch: int = 4, length: int = 6) -> dict[str, Any]:
    """A batch for a tower."""
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(batch, length, WIDTH, generator=generator) for name in ("x", "y")}
