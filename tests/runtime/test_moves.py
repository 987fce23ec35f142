"""Moves on real ranks: emitted, over either transport, they give the bits that the simulator gives."""

import operator
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from graphopt.emit.inductor import inductor_function
from graphopt.emit.module import load_source, write_source
from graphopt.emit.source import python_source
from graphopt.inspect.exchanges import Exchanges
from graphopt.ir import Program, moves
from graphopt.runtime.collectives import Collectives
from graphopt.runtime.parts import Parts
from tests.support.moved import Call, Values, forward, results, step
from tests.support.ranks import Ranks

SHAPE = (8, 6, 5)


def _calls(ranks: int) -> list[Call]:
    """Every move that has an adjoint, packed and padded; what goes in and what comes out is replicated."""
    packed, rows, padded = (1, 2), (0, 1), (2, 1)
    own = (ranks, "tp")
    chunk, chunk_of_5 = -(-3 // ranks), -(-5 // ranks)
    return [
        (moves.ENTER, ("tp",)),
        (moves.PART, (*packed, chunk, *own, True)),
        (moves.GATHER, (*packed, 3, *own, True)),
        (moves.PART, (*rows, 8 // ranks, *own, True)),
        (moves.GATHER, (*rows, 8, *own, False)),
        (moves.PART, (*padded, chunk_of_5, *own, False)),
        (moves.GATHER, (*padded, 5, *own, False)),
        (moves.FIRST, ("tp",)),
        (moves.SCATTER_SUM, (*packed, chunk, *own)),
        (moves.GATHER, (*packed, 3, *own, False)),
        (moves.PART, (*rows, 8 // ranks, *own, False)),
        *([(moves.ALL_TO_ALL, (1, 0, *own)), (moves.GATHER, (1, 1, 6, *own, False))] if ranks == 2 else []),
        *([(moves.GATHER, (*rows, 8, *own, False))] if ranks != 2 else []),
        (moves.FIRST, ("tp",)),
        (moves.LEAVE, ("tp",)),
    ]


def _program(ranks: int) -> Program:
    program, mode = forward(SHAPE, _calls(ranks))
    step(program, mode, {"tp": ranks})
    return program


def _inputs(ranks: int) -> list[Values]:
    generator = torch.Generator().manual_seed(ranks)
    value, tangent = (torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(2))
    return [[value] * ranks, [tangent] * ranks]


def _collectives(share_memory: bool) -> Collectives:
    assert dist.group.WORLD is not None
    return Collectives({"tp": dist.group.WORLD}, torch.device("cpu"), share_memory=share_memory)


def _run(rank: int, world: int, share_memory: bool) -> Any:
    collectives = _collectives(share_memory)
    assert (collectives.shared_axes == {"tp"}) is share_memory
    runtime = SimpleNamespace(collectives=collectives, parts=Parts(collectives.rank))
    module = load_source(write_source(python_source({"step": _program(world)}, "A step"), "step"))
    return module.step([each[rank] for each in _inputs(world)], runtime)


@pytest.mark.parametrize("share_memory", [True, False])
@pytest.mark.parametrize("world", [2, 4])
def test_emitted_moves_give_the_bits_of_the_simulator(
    ranks: Callable[[int], Ranks], world: int, share_memory: bool
) -> None:
    image, gradient = results(_program(world), {"tp": world}, _inputs(world))
    assert torch.equal(image[0], _inputs(world)[0][0]) and torch.equal(gradient[0], _inputs(world)[1][0])
    for rank, found in enumerate(ranks(world).run(_run, share_memory)):
        assert torch.equal(found[0], image[rank]) and torch.equal(found[1], gradient[rank])


def test_inductor_compiles_what_is_of_the_rank_alone() -> None:
    program, mode = forward(SHAPE, [(moves.PART, (1, 2, 2, 2, "tp", True))])
    step(program, mode, {"tp": 2})
    value, tangent = torch.randn(SHAPE).double(), torch.randn(8, 4, 5).double()
    image, gradient = inductor_function(program, mode)([value, tangent], SimpleNamespace(parts=Parts(lambda axis: 1)))
    assert torch.equal(image[:, ::2], value[:, 2::3]) and not image[:, 1::2].any()
    assert torch.equal(gradient[:, 2::3], tangent[:, ::2]) and not gradient[:, [0, 1, 3, 4]].any()


def _values(rank: int, rows: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(rows, 7, generator=torch.Generator().manual_seed(rank)).to(dtype)


def _exchange(rank: int, world: int, share_memory: bool) -> list[torch.Tensor]:
    """All of them in flight at once, of float32 and bfloat16; each is one tensor."""
    collectives, pending = _collectives(share_memory), []
    for dtype in (torch.float32, torch.bfloat16):
        for rows in (world, 3 * world, 1024 * world):
            value = _values(rank, rows, dtype)
            pending += [
                collectives.all_gather([value], "tp")[0],
                collectives.reduce_scatter([value], "tp")[0],
                collectives.all_reduce([value], "tp")[0],
                collectives.all_reduce([value], "tp", "max")[0],
                collectives.all_to_all(value, "tp")[0],
            ]
    assert collectives.rank("tp") == rank
    return list(map(operator.methodcaller("wait"), pending))


@pytest.mark.parametrize("share_memory", [True, False])
@pytest.mark.parametrize("world", [2, 4])
def test_single_collectives(ranks: Callable[[int], Ranks], world: int, share_memory: bool) -> None:
    exchanges, wanted = Exchanges({"tp": world}), []
    for dtype in (torch.float32, torch.bfloat16):
        for rows in (world, 3 * world, 1024 * world):
            values = [_values(rank, rows, dtype) for rank in range(world)]
            total = exchanges.reduced(values, "tp")
            wanted += [
                exchanges.gathered(values, 0, "tp"),
                [each.chunk(world)[rank] for rank, each in enumerate(total)],
                total,
                exchanges.reduced(values, "tp", "max"),
                exchanges.exchanged(values, 0, 0, "tp"),
            ]
    for rank, found in enumerate(ranks(world).run(_exchange, share_memory)):
        assert all(torch.equal(a, b[rank]) for a, b in zip(found, wanted, strict=True))
