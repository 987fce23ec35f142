"""Both transports give the same bits, in any order of waiting, whatever is abandoned or lost."""

import gc
import os
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from graphopt.errors import RankLostError, RankMismatchError
from graphopt.runtime.shared_memory import SharedMemoryTransport, connect
from graphopt.runtime.transport import GroupTransport, Transport
from tests.support.ranks import Ranks

SHAPES = [(1,), (3, 5), (0, 4), (129, 64), (2, 3, 4)]


def _group() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def _transports() -> list[Transport]:
    shared = connect(_group())
    assert shared is not None
    return [shared, GroupTransport(_group(), torch.device("cpu"))]


def _results(rank: int, world: int) -> list[list[list[torch.Tensor]]]:
    """Of both transports: gathers and sums of all shapes at once, and of each alone, in float32 and bfloat16."""
    found = []
    for transport in _transports():
        results = []
        for dtype in (torch.float32, torch.bfloat16):
            generator = torch.Generator().manual_seed(rank)
            shards = [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]
            whole = [torch.randn(world * rows, *rest, generator=generator).to(dtype) for rows, *rest in SHAPES]
            for some in (slice(None), slice(0, 1), slice(3, 4)):
                results.append(transport.all_gather(shards[some], [None] * len(shards[some]))())
                results.append(transport.reduce_scatter(whole[some])())
        found.append(results)
    return found


def test_both_transports_give_the_same_bits(ranks: Callable[[int], Ranks]) -> None:
    for world in (1, 2, 4):
        everyone = ranks(world).run(_results)
        for shared, sockets in everyone:
            for ours, theirs in zip(shared, sockets, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
            assert shared[0][3].shape == (world * 129, 64)


def _many(rank: int, world: int, seed: int) -> int:
    """Gathers of random sizes, several in flight, waited for in random order or never. Returns the segments in use."""
    transport = connect(_group())
    assert transport is not None
    shared, own = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + rank + 1)
    flights: list[tuple[torch.Tensor, Any]] = []
    for turn in range(200):
        size = int(torch.randint(1, 50_000, (), generator=shared))
        expected = torch.cat([torch.full((size,), float(turn * world + other)) for other in range(world)])
        flights.append((expected, transport.all_gather([torch.full((size,), float(turn * world + rank))], [None])))
        if torch.rand((), generator=own) < 0.1:
            time.sleep(0.001)
        while len(flights) > 3:
            expected, finish = flights.pop(int(torch.randint(len(flights), (), generator=own)))
            if torch.rand((), generator=own) < 0.8:
                assert torch.equal(finish()[0], expected)
            del finish
    for expected, finish in flights:
        assert torch.equal(finish()[0], expected)
    return transport.channel.links.segments


@pytest.mark.parametrize("seed", range(3))
def test_exchanges_may_be_waited_for_in_any_order_or_never(ranks: Callable[[int], Ranks], seed: int) -> None:
    for world in (2, 4):
        assert max(ranks(world).run(_many, seed)) < 40, "of 200: segments are used again"


def _into(rank: int, world: int) -> bool:
    """Gathering into storage whose own part is the shard, as resident parameters do."""
    same = []
    for transport in _transports():
        whole = [torch.full((world * 3, 2), -1.0), torch.full((world, 7), -1.0)]
        for tensor in whole:
            tensor.view(world, -1)[rank] = float(rank)
        shards = [tensor.view(world, -1)[rank].view(-1, *tensor.shape[1:]) for tensor in whole]
        results = transport.all_gather(shards, list(whole))()
        for tensor, result in zip(whole, results, strict=True):
            wanted = torch.arange(float(world)).view(-1, 1).expand(world, tensor.numel() // world)
            same.append(result is tensor and torch.equal(tensor.view(world, -1), wanted))
    return all(same)


def test_a_gather_fills_storage_that_holds_the_shard(ranks: Callable[[int], Ranks]) -> None:
    assert all(ranks(2).run(_into))


def _sources_are_free(rank: int, world: int) -> bool:
    """What was given to a collective may go before the wait."""
    right = []
    for transport in _transports():
        source = torch.full((4, 2), float(rank))
        other = torch.full((2, 2), float(rank))
        finish = transport.reduce_scatter([source, other])
        del source, other
        first, second = finish()
        right.append(bool((first == 1).all()) and bool((second == 1).all()))
    return all(right)


def test_sources_may_go_once_a_collective_has_started(ranks: Callable[[int], Ranks]) -> None:
    assert all(ranks(2).run(_sources_are_free))


def _different_sizes(rank: int, world: int) -> str:
    transport = connect(_group())
    assert transport is not None
    try:
        transport.all_gather([torch.zeros(4 + rank)], [None])()
    except RankMismatchError as error:
        return str(error)
    return "no error"


def test_ranks_that_send_different_sizes_all_learn_of_it(ranks: Callable[[int], Ranks]) -> None:
    messages = ranks(2).run(_different_sizes)
    assert messages[0] == "rank 1 sent 20 bytes where rank 0 sent 16: they run different programs"
    assert messages[1] == "rank 0 sent 16 bytes where rank 1 sent 20: they run different programs"


def _one_leaves(rank: int, world: int) -> str:
    transport = connect(_group())
    assert isinstance(transport, SharedMemoryTransport)
    transport.all_gather([torch.zeros(4)], [None])()
    if rank == 1:
        transport.channel.links.close()
        return "left"
    try:
        transport.all_gather([torch.zeros(4)], [None])()
    except RankLostError as error:
        return str(error)
    return "no error"


def test_a_rank_that_ends_is_named_at_once(ranks: Callable[[int], Ranks]) -> None:
    assert ranks(2).run(_one_leaves)[0] == "rank 1 has ended; its own output says why"


def _files(rank: int, world: int) -> tuple[int, int]:
    """Open files before and after a transport has lived."""
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    transport = connect(_group())
    assert transport is not None
    transport.all_gather([torch.zeros(4)], [None])()
    dist.barrier()
    del transport
    gc.collect()
    return before, len(os.listdir("/proc/self/fd"))


def test_a_transport_leaves_no_file_open(ranks: Callable[[int], Ranks]) -> None:
    for before, after in ranks(2).run(_files):
        assert after <= before
