"""What a standalone program runs on: plain torch, no graphopt but `Parts`. The text of both becomes part of it."""

import functools
import math
import os
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.multiprocessing.spawn import spawn

from graphopt.runtime.parts import Parts

Role = tuple[str, str]  # what a value is, and of what: ("shard", "lm_head.weight"), ("saved", "mul_3")


@dataclass(frozen=True)
class Tensor:
    """A tensor that the program is given. high: integers are drawn from 0 to high - 1."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    high: int = 2

    def drawn(self, name: str, seed: int) -> torch.Tensor:
        """Random elements that the name and the seed decide: small normal floats, or integers below `high`."""
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)
        if self.dtype.is_floating_point or self.dtype.is_complex:
            return (torch.randn(self.shape, generator=generator) / 8).to(self.dtype)
        return torch.randint(self.high, self.shape, generator=generator).to(self.dtype)


@dataclass(frozen=True)
class Parameter(Tensor):
    """A whole parameter. If it is sharded, ranks of the mesh axis `axis` hold equal parts of its dimension `dim`."""

    axis: str | None = None
    dim: int = 0

    def shard(self, whole: torch.Tensor, index: int, ranks: int) -> torch.Tensor:
        """Part `index` of `whole`; dimensions before `dim` are of size one and dropped, rows are padded with zeros."""
        rows = whole.reshape(self.shape[self.dim :])
        size = -(-rows.shape[0] // ranks)
        padded = rows.new_zeros(size * ranks, *rows.shape[1:])
        padded[: rows.shape[0]] = rows
        return padded[index * size : (index + 1) * size].clone()


class InFlight:
    """The result of a collective that has been started; `wait` gives it, once it is there."""

    def __init__(self, work: Any, result: Callable[[], torch.Tensor]) -> None:
        self._work = work
        self._result = result

    def wait(self) -> torch.Tensor:
        self._work.wait()
        return self._result()


class Collectives:
    """Starts collectives over the ranks of a mesh axis; each takes a list of tensors and gives a list in flight."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self._mesh = mesh

    def all_gather(self, shards: list[torch.Tensor], axis: str) -> list[InFlight]:
        """Every rank's rows of each tensor, end to end."""
        return [self._all_gather(shard.contiguous(), axis) for shard in shards]

    def reduce_scatter(self, tensors: list[torch.Tensor], axis: str) -> list[InFlight]:
        """The sum over ranks of this rank's rows of each tensor."""
        return [self._reduce_scatter(tensor.contiguous(), axis) for tensor in tensors]

    def all_reduce(self, tensors: list[torch.Tensor], axis: str, reduction: str = "sum") -> list[InFlight]:
        """The sum over ranks of each tensor, or the maximum (``max``)."""
        return [self._all_reduce(tensor.clone(), axis, reduction) for tensor in tensors]

    def all_to_all(self, tensor: torch.Tensor, axis: str) -> list[InFlight]:
        """The rows of one tensor that each rank has for this one, end to end."""
        rows = torch.empty_like(tensor)
        work = dist.all_to_all_single(rows, tensor, group=self._mesh.get_group(axis), async_op=True)
        return [InFlight(work, lambda: rows)]

    def rank(self, axis: str) -> int:
        """This rank's place on an axis."""
        return self._mesh.get_local_rank(axis)

    def _all_gather(self, shard: torch.Tensor, axis: str) -> InFlight:
        group = self._mesh.get_group(axis)
        parts = [torch.empty_like(shard) for _ in range(dist.get_world_size(group))]
        return InFlight(dist.all_gather(parts, shard, group, async_op=True), lambda: torch.cat(parts))

    def _reduce_scatter(self, tensor: torch.Tensor, axis: str) -> InFlight:
        """Ranks exchange rows, then each adds up what it got, in the order of the ranks: gloo has nothing better."""
        group = self._mesh.get_group(axis)
        rows = torch.empty_like(tensor)
        work = dist.all_to_all_single(rows, tensor, group=group, async_op=True)
        return InFlight(work, lambda: functools.reduce(torch.add, rows.chunk(dist.get_world_size(group))).clone())

    def _all_reduce(self, tensor: torch.Tensor, axis: str, reduction: str) -> InFlight:
        group, by = self._mesh.get_group(axis), dist.ReduceOp.MAX if reduction == "max" else dist.ReduceOp.SUM
        return InFlight(dist.all_reduce(tensor, by, group, async_op=True), lambda: tensor)


class Elsewhere:
    """A tensor on the host or in a file, from the copy out to the copy back; here they are made at once."""

    def __init__(self, value: torch.Tensor, place: str) -> None:
        self._device = value.device
        self._host = value.to("cpu", copy=True)
        self._file = tempfile.TemporaryFile() if place == "disk" else None  # noqa: SIM115 (closed with the object)
        if self._file is not None:
            torch.save(self._host, self._file)
            del self._host

    def wait(self) -> "Elsewhere":
        return self

    def back(self) -> torch.Tensor:
        if self._file is None:
            return self._host.to(self._device, copy=True)
        self._file.seek(0)
        return torch.load(self._file).to(self._device)  # type: ignore[no-any-return]


class Back:
    """A tensor that is back."""

    def __init__(self, value: torch.Tensor) -> None:
        self._value = value

    def wait(self) -> torch.Tensor:
        return self._value


class Copies:
    """Starts copies elsewhere and back."""

    def out(self, value: torch.Tensor, place: str, name: str) -> Elsewhere:
        return Elsewhere(value, place)

    def back(self, kept: Elsewhere) -> Back:
        return Back(kept.back())

    def stored(self, value: torch.Tensor, place: str) -> Back:
        """A gradient that stays elsewhere; here it is a copy."""
        return Back(value.clone())

    def fetched(self, stored: torch.Tensor) -> Back:
        """A parameter that comes in; here it is a copy."""
        return Back(stored.clone())


class Runtime:
    """What `forward` and `backward` are given beside their inputs."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.collectives = Collectives(mesh)
        self.parts = Parts(self.collectives.rank)
        self.copies = Copies()

    def refresh(self, names: list[str], shards: list[torch.Tensor], axis: str) -> list[InFlight]:
        """Parameters that stay gathered from step to step, until their shards change; here there is one step."""
        return self.collectives.all_gather(shards, axis)


@dataclass(frozen=True)
class Step:
    """One training step. mesh: axis -> ranks; backward: None where no gradient was asked for.

    The roles say, in order, what goes into each function and what comes out of it.
    """

    mesh: dict[str, int]
    device: str
    parameters: dict[str, Parameter]
    buffers: dict[str, Tensor]
    batch: dict[str, Tensor]
    tangents: dict[str, Tensor]
    constants: dict[str, torch.Tensor]
    forward: Callable[[list[Any], Runtime], list[Any]]
    forward_inputs: list[Role]
    forward_outputs: list[Role]
    backward: Callable[[list[Any], Runtime], list[Any]] | None
    backward_inputs: list[Role]
    backward_outputs: list[Role]

    @property
    def ranks(self) -> int:
        return math.prod(self.mesh.values())

    def inputs(self, rank: int, seed: int) -> dict[Role, torch.Tensor]:
        """Random inputs: parameters and buffers alike on all ranks, another batch on each."""
        values: dict[Role, torch.Tensor] = {("constant", name): value for name, value in self.constants.items()}
        place = dict(zip(self.mesh, _place(rank, list(self.mesh.values())), strict=True))
        for name, parameter in self.parameters.items():
            whole = values["parameter", name] = parameter.drawn(name, seed)
            if parameter.axis is not None:
                ranks = self.mesh[parameter.axis]
                values["shard", name] = parameter.shard(whole, place[parameter.axis], ranks)
        for name, buffer in self.buffers.items():
            values["buffer", name] = buffer.drawn(name, seed).abs()  # a variance may be among them
        for name, tensor in self.batch.items():
            values["batch", name] = tensor.drawn(name, seed + 1 + rank)
        for name, tangent in self.tangents.items():
            is_loss = not tangent.shape
            values["tangent", name] = torch.ones((), dtype=tangent.dtype) if is_loss else tangent.drawn(name, seed)
        return {role: value.to(self.device) for role, value in values.items()}

    def run(self, rank: int, seed: int, runtime: Runtime) -> dict[Role, torch.Tensor]:
        """What the step gives on one rank: outputs, new buffers, gradients."""
        values = self.inputs(rank, seed)
        torch.manual_seed(seed + 1 + rank)  # what dropout draws
        results = self.forward([values[role] for role in self.forward_inputs], runtime)
        values.update(zip(self.forward_outputs, results, strict=True))
        found = {role: values[role] for role in self.forward_outputs if role[0] != "saved"}
        if self.backward is not None:
            gradients = self.backward([values[role] for role in self.backward_inputs], runtime)
            found.update((role, g) for role, g in zip(self.backward_outputs, gradients, strict=True) if g is not None)
        return found


def _place(rank: int, sizes: list[int]) -> list[int]:
    """The coordinates of a rank on a mesh whose first axis varies slowest."""
    place = []
    for size in reversed(sizes):
        rank, index = divmod(rank, size)
        place.append(index)
    return place[::-1]


def described(value: torch.Tensor) -> str:
    """Dtype and shape, sum and norm, and a checksum of the bits."""
    wide = value.detach().cpu().double()
    bits = zlib.crc32(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    kind = f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return f"{kind} sum {wide.sum().item():+.6e} norm {wide.norm().item():.6e} bits {bits:08x}"


def run_rank(rank: int, step: Step, seed: int, init_method: str) -> None:
    """One process of the step: joins the others, runs, and lets the first print what all of them got."""
    backend = "gloo" if step.device == "cpu" else "nccl"
    dist.init_process_group(backend, init_method=init_method, rank=rank, world_size=step.ranks)
    mesh = init_device_mesh(step.device.partition(":")[0], tuple(step.mesh.values()), mesh_dim_names=tuple(step.mesh))
    with torch.no_grad():
        found = step.run(rank, seed, Runtime(mesh))
    lines = [f"rank {rank}: {' '.join(role)}: {described(value)}" for role, value in found.items()]
    everyone: list[Any] = [None] * step.ranks
    dist.gather_object(lines, everyone if rank == 0 else None)
    if rank == 0:
        print("\n".join(line for own in everyone for line in own))
    dist.destroy_process_group()


def main(step: Step, seed: int = 0) -> None:
    """Run one step on all ranks: those that torchrun started, or as many processes on this machine."""
    if "RANK" in os.environ:
        run_rank(int(os.environ["RANK"]), step, seed, "env://")
        return
    with tempfile.TemporaryDirectory() as folder:
        spawn(run_rank, (step, seed, f"file://{folder}/store"), nprocs=step.ranks)
