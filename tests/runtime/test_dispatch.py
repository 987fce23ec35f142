"""Rows to the ranks that have their groups, and back: on real ranks, over either transport, as plain indexing does."""

import operator
from collections.abc import Callable

import hypothesis
import pytest
import torch
import torch.distributed as dist
from hypothesis import strategies as st

from graphopt.errors import GraphoptError
from graphopt.inspect.exchanges import Exchanges
from graphopt.runtime.collectives import Collectives
from graphopt.runtime.routes import Routes, Run, placed_rows
from tests.support.ranks import Ranks

Counts = list[list[int]]  # of each rank, of each group


@st.composite
def counts(draw: st.DrawFn) -> Counts:
    ranks, groups = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    return [[draw(st.sampled_from([0, 0, 1, 2, 7])) for _ in range(groups)] for _ in range(ranks)]


def _ends(counts: Counts) -> torch.Tensor:
    return torch.tensor(counts).cumsum(1).to(torch.int32).view(-1)


def _placed(runs: list[Run], values: list[torch.Tensor], rows: int) -> torch.Tensor:
    found = [values[run.rank][run.there : run.there + run.rows] for run in runs]
    return placed_rows(runs, found, values[0], rows)


@hypothesis.given(counts(), st.integers(0, 3))
def test_routes_lead_where_the_groups_are_and_back(counts: Counts, spare: int) -> None:
    ranks, groups = len(counts), len(counts[0])
    share = -(-groups // ranks)
    rows = max(map(sum, counts)) + spare
    ends = _ends(counts)
    generator = torch.Generator().manual_seed(rows)
    own = [torch.randn(rows, 2, generator=generator) for _ in range(ranks)]
    routes = [Routes.of(ends, ranks, rank) for rank in range(ranks)]
    room = routes[0].most + spare
    kept = [_placed(routes[rank].kept, own, room) for rank in range(ranks)]
    for rank in range(ranks):
        starts = [[0, *torch.tensor(each).cumsum(0).tolist()] for each in counts]
        wanted = [
            own[other][starts[other][group] : starts[other][group + 1]]
            for group in range(rank * share, min((rank + 1) * share, groups))
            for other in range(ranks)
        ]
        together = torch.cat([own[0][:0], *wanted])
        assert torch.equal(kept[rank][: len(together)], together) and not kept[rank][len(together) :].any()
        back = _placed(routes[rank].out, kept, rows)
        sent = sum(counts[rank])
        assert torch.equal(back[:sent], own[rank][:sent]) and not back[sent:].any()
    exchanges = Exchanges({"ep": ranks})
    assert all(map(torch.equal, exchanges.dispatched(own, [ends] * ranks, room, ranks, "ep"), kept))
    masked = [each * (torch.arange(rows) < sum(of_rank))[:, None] for each, of_rank in zip(own, counts, strict=True)]
    assert all(map(torch.equal, exchanges.combined(kept, [ends] * ranks, rows, ranks, "ep"), masked))


def _collectives(share_memory: bool) -> Collectives:
    assert dist.group.WORLD is not None
    return Collectives({"ep": dist.group.WORLD}, torch.device("cpu"), share_memory=share_memory)


def _values(rank: int, rows: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(rows, 3, 2, generator=torch.Generator().manual_seed(rank)).to(dtype)


ROWS = 12
DRAWN: dict[int, list[Counts]] = {
    2: [[[3, 0, 4], [0, 5, 7]], [[0, 0, 0, 12], [0, 0, 0, 0]], [[6, 6], [12, 0]]],
    4: [[[2, 1, 3, 0, 6]] * 4, [[0, 0, 0, 0, 0], [12, 0, 0, 0, 0], [0, 0, 1, 0, 0], [1, 2, 3, 4, 2]]],
}


def _exchange(rank: int, world: int, share_memory: bool) -> list[torch.Tensor]:
    """All of them in flight at once, and then all back."""
    collectives = _collectives(share_memory)
    cases = [(counts, dtype) for counts in DRAWN[world] for dtype in (torch.float32, torch.bfloat16, torch.int64)]
    room = world * ROWS
    there = [collectives.dispatch(_values(rank, ROWS, dtype), _ends(counts), room, "ep")[0] for counts, dtype in cases]
    arrived = list(map(operator.methodcaller("wait"), there))
    back = [
        collectives.combine(value, _ends(counts), ROWS, "ep")[0]
        for value, (counts, _) in zip(arrived, cases, strict=True)
    ]
    return [*arrived, *map(operator.methodcaller("wait"), back)]


@pytest.mark.parametrize("share_memory", [True, False])
@pytest.mark.parametrize("world", [2, 4])
def test_rows_travel_over_either_transport(ranks: Callable[[int], Ranks], world: int, share_memory: bool) -> None:
    exchanges, there, back = Exchanges({"ep": world}), [], []
    for counts in DRAWN[world]:
        for dtype in (torch.float32, torch.bfloat16, torch.int64):
            ends = [_ends(counts)] * world
            values = [_values(rank, ROWS, dtype) for rank in range(world)]
            there.append(exchanges.dispatched(values, ends, world * ROWS, world, "ep"))
            back.append(exchanges.combined(there[-1], ends, ROWS, world, "ep"))
    for rank, found in enumerate(ranks(world).run(_exchange, share_memory)):
        assert all(map(torch.equal, found, [each[rank] for each in [*there, *back]]))


def _crowded(rank: int, world: int) -> str:
    collectives = _collectives(True)
    with pytest.raises(GraphoptError) as caught:
        collectives.dispatch(_values(rank, ROWS, torch.float32), _ends([[0, 12], [3, 9]]), 20, "ep")
    return str(caught.value)


def test_too_many_rows_for_one_rank_are_an_error_on_all(ranks: Callable[[int], Ranks]) -> None:
    said = ranks(2).run(_crowded)
    assert said[0] == said[1] and "is sent 21 rows for its experts and has room for 20" in said[0]
    assert "raise it, or leave it out" in said[0]
