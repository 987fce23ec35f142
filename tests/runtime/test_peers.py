"""Messages between two ranks: the same through shared memory and through a process group, whatever is lost or wrong."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist

from graphopt.errors import RankLostError, RankMismatchError
from graphopt.runtime.group_peers import HostPeers, StreamPeers
from graphopt.runtime.messages import TensorSpec
from graphopt.runtime.neighbours import linked
from graphopt.runtime.peers import Peers, SharedMemoryPeers
from tests.support.ranks import Ranks

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.bool, torch.int64, torch.uint8, torch.complex64]
SHAPES: list[tuple[int, ...]] = [(), (1,), (3, 5), (0, 4), (129, 64)]


def _group() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def _shared() -> SharedMemoryPeers:
    links = linked(_group())
    assert links is not None
    return SharedMemoryPeers(links)


def _all_peers() -> Iterator[Peers]:
    yield _shared()
    yield HostPeers(_group())
    yield StreamPeers(_group(), CPU)  # gloo's own waits stand for those of a stream
    dist.barrier()


def _message(sender: int, number: int) -> list[torch.Tensor]:
    """Of many dtypes and shapes, some not contiguous; none at all in the fifth."""
    generator = torch.Generator().manual_seed(1000 * sender + number)
    dtypes = [] if number == 4 else DTYPES
    return [
        (100 * torch.randn(shape, generator=generator)).to(dtype).movedim(0, -1)
        if shape
        else torch.ones((), dtype=dtype)
        for shape in SHAPES
        for dtype in dtypes
    ]


def _equal(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> bool:
    pairs = zip(found, wanted, strict=True)
    return all(a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b) for a, b in pairs)


def _around(rank: int, world: int) -> list[bool]:
    """Every rank sends several messages to both neighbours first, then takes theirs, the last ones first."""
    right = []
    for peers in _all_peers():
        others = sorted({(rank - 1) % world, (rank + 1) % world} - {rank})
        arriving = {}
        for number in range(6):
            for other in others if rank % 2 else reversed(others):
                peers.send(other, _message(rank, number))
            for other in others:
                specs = [TensorSpec.of(tensor) for tensor in _message(other, number)]
                arriving[other, number] = peers.receive(other, specs)
        while arriving:
            (other, number), finish = arriving.popitem()
            right.append(_equal(finish(), _message(other, number)))
        peers.flush()
    return right


@pytest.mark.parametrize("world", [2, 4])
def test_messages_arrive_in_order_by_any_transport(ranks: Callable[[int], Ranks], world: int) -> None:
    assert all(all(right) for right in ranks(world).run(_around))


def _there_and_back(rank: int, world: int) -> int:
    """Messages of sizes that differ, each answered. Returns the segments in use."""
    peers, other = _shared(), 1 - rank
    for turn in range(100):
        size = 1000 + 37 * (turn % 20)
        message = torch.full((size,), float(turn))
        if rank == 0:
            peers.send(other, [message])
            del message
        (found,) = peers.receive(other, [TensorSpec((size,), torch.float32)])()
        assert bool((found == turn).all())
        if rank == 1:
            peers.send(other, [found])
    return peers.links.segments


def test_segments_are_used_again(ranks: Callable[[int], Ranks]) -> None:
    assert max(ranks(2).run(_there_and_back)) <= 8, "of 20 sizes"


def _many_first(rank: int, world: int) -> bool:
    """More messages, both ways, than a socket holds before anyone reads."""
    right = True
    for peers in (_shared(), HostPeers(_group())):
        other, count = 1 - rank, 600
        for number in range(count):
            peers.send(other, [torch.tensor([float(number)])])
        finishes = [peers.receive(other, [TensorSpec((1,), torch.float32)]) for _ in range(count)]
        right = right and [float(finish()[0]) for finish in finishes] == list(map(float, range(count)))
        peers.flush()
    return right


def test_both_may_send_first_however_many(ranks: Callable[[int], Ranks]) -> None:
    assert all(ranks(2).run(_many_first, timeout=60))


def _different(rank: int, world: int) -> list[str]:
    said = []
    for peers, wrong in ((_shared(), (1, 3)), (HostPeers(_group()), (1,))):
        for rows in wrong:
            if rank == 0:
                peers.send(1, [torch.zeros(2, 64)])
                continue
            with pytest.raises(RankMismatchError) as caught:
                peers.receive(0, [TensorSpec((rows, 64), torch.float32)])()
            said.append(str(caught.value))
    return said


def test_a_message_of_other_bytes_is_an_error() -> None:
    ranks = Ranks(2)  # of their own: gloo still waits for who takes the message
    try:
        said = ranks.run(_different, timeout=60)[1]
    finally:
        ranks.close()
    form = "rank 0 sent a message of 512 bytes where rank 1 expects {}: they run different programs"
    assert said == [form.format(each) for each in (256, 768, 256)]


def _of_some(rank: int, world: int) -> str:
    """What rank 3 is called by rank 1, of a group of two, which waits for it."""
    group = dist.new_group([1, 3])
    if rank not in (1, 3):
        return ""
    links = linked(group)
    assert links is not None
    peers = SharedMemoryPeers(links)
    if rank == 3:
        links.close()
        return ""
    with pytest.raises(RankLostError) as caught:
        peers.receive(1, [])()
    return str(caught.value)


def test_errors_name_ranks_as_the_world_does(ranks: Callable[[int], Ranks]) -> None:
    assert ranks(4).run(_of_some)[1] == "rank 3 has ended; its own output says why"
