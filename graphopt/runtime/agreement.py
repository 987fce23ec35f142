"""Ranks make sure that they hold the same plan, model and program before they depend on each other."""

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from graphopt.errors import RankMismatchError


@dataclass(frozen=True)
class Statement:
    """What a rank has to say: named facts that must be the same everywhere, or the error that kept it from them."""

    facts: dict[str, str]
    error: str | None = None


def agree(statement: Statement, group: dist.ProcessGroup | None) -> None:
    """Exchange statements over `group` (None for a world of one).

    Raises RankMismatchError on every rank if any rank failed or states other facts than the first.
    """
    if group is None:
        return
    statements: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(statements, statement, group=group)
    failed = {rank: s.error for rank, s in enumerate(statements) if s.error is not None}
    if failed:
        raise RankMismatchError("; ".join(f"rank {rank} failed: {error}" for rank, error in failed.items()))
    first = statements[0].facts
    for rank, other in enumerate(statements):
        for name, value in first.items():
            if other.facts.get(name) != value:
                raise RankMismatchError(
                    f"the ranks differ in their {name}: rank 0 has {_short(value)}, rank {rank} has "
                    f"{_short(other.facts.get(name, 'none'))}; start every rank with the same program and arguments"
                )


def _short(text: str, width: int = 200) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
