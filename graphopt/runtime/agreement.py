"""Ranks make sure that they hold the same plan, model and program before they depend on each other."""

import contextlib
import hashlib
import itertools
from collections.abc import Iterator
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

    Raises RankMismatchError on every rank if any rank failed or states other facts than the first. Digests travel
    first, so that long facts cost nothing where all is well.
    """
    if group is None:
        return
    digests = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in statement.facts.items()}
    answers = exchanged((digests, statement.error), group)
    failed = {rank: error for rank, (_, error) in enumerate(answers) if error is not None}
    if failed:
        raise RankMismatchError("; ".join(f"rank {rank} failed: {error}" for rank, error in failed.items()))
    if any(theirs != digests for theirs, _ in answers):
        raise RankMismatchError(_difference(exchanged(statement.facts, group)))


@contextlib.contextmanager
def failing_together(group: dist.ProcessGroup | None) -> Iterator[None]:
    """What raises inside on one rank of `group` ends with a RankMismatchError on the others; all enter together."""
    try:
        yield
    except Exception as error:
        with contextlib.suppress(RankMismatchError):  # it tells the other ranks; here the cause is known
            agree(Statement({}, f"{type(error).__name__}: {error}"), group)
        raise
    agree(Statement({}), group)


def exchanged(value: Any, group: dist.ProcessGroup) -> list[Any]:
    """What each rank says, in rank order; all ranks of `group` call this together."""
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def _difference(facts: list[dict[str, str]]) -> str:
    """The first line in which some rank differs from the first."""
    for rank, theirs in enumerate(facts):
        for name in facts[0].keys() | theirs.keys():
            lines = [each.get(name, "none").splitlines() for each in (facts[0], theirs)]
            for one, other in itertools.zip_longest(*lines, fillvalue="nothing more"):
                if one != other:
                    return (
                        f"the ranks differ in their {name}: rank 0 has {_short(one)}, rank {rank} has {_short(other)}; "
                        "start every rank with the same program and arguments"
                    )
    raise AssertionError("digests differ, facts do not")


def _short(text: str, width: int = 200) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
