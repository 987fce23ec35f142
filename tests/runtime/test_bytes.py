"""What moves and what is held, against the formulas of ZeRO (Rajbhandari et al. 2020, section 5)."""

import gc
import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

import graphopt
from bench.segments import is_in_segment, mapped_segments
from graphopt import Plan, Zero
from graphopt._torch import TorchDispatchMode

WIDTH, LAYERS = 128, 8
LAYER_BYTES = 2 * WIDTH * WIDTH * 4
WHOLE_BYTES = LAYERS * LAYER_BYTES


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH, bias=False)
        self.down = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class _Blocks(nn.Module):
    """Every parameter is used in both directions: the input wants a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Block() for _ in range(LAYERS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


def _step(model: nn.Module) -> None:
    model(torch.randn(4, WIDTH, requires_grad=True)).backward()


def _communication(rank: int, world: int) -> list[float]:
    totals = []
    for stage in range(4):
        model = graphopt.compile(_Blocks(), Plan(zero=stage))
        _step(model)
        totals.append(graphopt.report(model).communication.total_bytes)
    return totals


@pytest.mark.parametrize("world", [2, 4])
def test_a_step_moves_the_least_bytes(ranks, world: int) -> None:
    totals = ranks(world).run(_communication)[0]
    share = WHOLE_BYTES * (world - 1) / world
    assert totals == pytest.approx([2 * share, 2 * share, 2 * share, 3 * share], rel=0.01)


class _Counted(TorchDispatchMode):
    """Bytes that this rank sends in the collectives that really run, or reads from segments of other ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.moved = 0.0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function)
        ranks = dist.get_world_size()
        if "_allgather_base_" in name or "allgather_into_tensor" in name:
            self.moved += args[1].nbytes * (ranks - 1)
        elif "alltoall_base_" in name:
            self.moved += args[1].nbytes * (ranks - 1) / ranks
        elif "c10d" in name and "barrier" not in name:
            raise AssertionError(f"{name} is not counted")
        elif name in ("aten.cat.out", "aten.add.Tensor", "aten.add.out"):
            read = args[0] if isinstance(args[0], list) else args
            shared = sum(t.nbytes for t in read if isinstance(t, torch.Tensor) and is_in_segment(t))
            self.moved += shared * (ranks - 1) / ranks  # as much is read of each rank's segment, one's own included
        return function(*args, **(kwargs or {}))


def _counted(rank: int, world: int, transport: str) -> list[float]:
    totals = []
    for stage in range(4):
        model = graphopt.compile(_Blocks(), Plan(zero=stage, transport=transport))
        _step(model)
        with _Counted() as counted:
            _step(model)
        totals.append(counted.moved)
    return totals


@pytest.mark.parametrize("transport", ["auto", "group"])
def test_the_running_program_moves_what_the_report_says(ranks, transport: str) -> None:
    share = WHOLE_BYTES * 3 / 4
    assert ranks(4).run(_counted, transport)[0] == pytest.approx([2 * share, 2 * share, 2 * share, 3 * share], rel=0.01)


def _state_bytes(rank: int, world: int) -> list[tuple[int, int]]:
    """Distinct storage of parameters with what is resident, and of optimizer state, after a step."""
    found = []
    for stage in range(4):
        model = graphopt.compile(_Blocks(), Plan(zero=stage))
        optimizer = torch.optim.AdamW(model.parameters())
        _step(model)
        optimizer.step()
        optimizer.zero_grad()
        moments = [v for s in optimizer.state.values() for k, v in s.items() if k.startswith("exp")]
        found.append((_storage_bytes(list(model.parameters())), _storage_bytes(moments)))
    return found


def _storage_bytes(tensors: list[torch.Tensor]) -> int:
    storages = [(t.to_local() if isinstance(t, DTensor) else t).untyped_storage() for t in tensors]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


@pytest.mark.parametrize("world", [2, 4])
def test_model_state_is_what_the_stage_says(ranks, world: int) -> None:
    shard = WHOLE_BYTES / world
    wanted = [(WHOLE_BYTES, 2 * WHOLE_BYTES), (WHOLE_BYTES, 2 * shard), (WHOLE_BYTES, 2 * shard), (shard, 2 * shard)]
    for found, formula in zip(ranks(world).run(_state_bytes)[0], wanted, strict=True):
        assert found == pytest.approx(formula, rel=0.02)


class _Gathered(TorchDispatchMode):
    """The most bytes alive at any operation: of gathered parameters, and of the buffers that they travel in."""

    def __init__(self) -> None:
        super().__init__()
        self.parameters: list[tuple[weakref.ref[Any], int]] = []
        self.buffers: list[tuple[weakref.ref[Any], int]] = []
        self.most = [0, 0]

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function)
        out = function(*args, **(kwargs or {}))
        if "_allgather_base_" in name or "allgather_into_tensor" in name:
            _watch(self.buffers, args[0])
        if name == "aten.new_empty.default" and out.nbytes == WIDTH * WIDTH * 4:
            _watch(self.parameters, out)  # a parameter about to be taken out of its bucket
        for index, watched in enumerate((self.parameters, self.buffers)):
            watched[:] = [(reference, size) for reference, size in watched if reference() is not None]
            self.most[index] = max(self.most[index], sum(size for _, size in watched))
        return out


def _watch(watched: list[tuple[weakref.ref[Any], int]], tensor: torch.Tensor) -> None:
    storage = tensor.untyped_storage()
    watched.append((weakref.ref(storage), storage.nbytes()))


def _most_gathered(rank: int, world: int, prefetch: int, transport: str) -> tuple[int, int, int]:
    """Bytes of gathered parameters, of buffers, and of the segments of all ranks."""
    torch.manual_seed(0)
    gc.collect()
    before = mapped_segments()
    zero = Zero(3, bucket_bytes=LAYER_BYTES, prefetch=prefetch)
    model = graphopt.compile(_Blocks(), Plan(zero=zero, transport=transport))
    _step(model)
    gc.collect()
    with _Gathered() as gathered:
        _step(model)
    return (*gathered.most, mapped_segments() - before)


@pytest.mark.parametrize("prefetch", [0, 1, 2])
@pytest.mark.parametrize("transport", ["auto", "group"])
def test_no_more_is_gathered_at_a_time_than_the_plan_allows(ranks, prefetch: int, transport: str) -> None:
    """One bucket in use and `prefetch` on their way; gloo may hold on to one that has arrived for a moment.

    A shared segment is free once the others have read it, at the latest when what was launched after it was waited for
    has arrived: twice as many as are in flight, and one. Each holds a rank's part of a bucket, or its gradients.
    """
    parameters, buffers, segments = ranks(2).run(_most_gathered, prefetch, transport)[0]
    assert 0 < parameters <= LAYER_BYTES
    if transport == "group":
        assert 0 < buffers <= (prefetch + 2) * LAYER_BYTES and segments == 0
    else:
        in_use = 2 * (prefetch + 1) + 1
        assert buffers == 0 < segments <= 2 * in_use * (LAYER_BYTES // 2 + LAYER_BYTES)
