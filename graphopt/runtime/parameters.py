"""A model's parameters as DTensors over the ranks, in place, and the bytes below them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from graphopt._torch import distributed_tensor, local_tensor, redistribute_in_place
from graphopt.ir import ParameterLayout
from graphopt.plan import Offload, Plan
from graphopt.runtime.copies import Copies


def choose_layouts(model: nn.Module, plan: Plan) -> dict[str, ParameterLayout]:
    """How each parameter (by its first name) lies over the data-parallel ranks of a resolved plan, not split."""
    axis = plan.data_parallel_axis
    layouts = {}
    for name, parameter in model.named_parameters():
        size = parameter.numel() * parameter.element_size()
        whole = plan.zero.stage == 0 or size < plan.zero.whole_below
        layouts[name] = ParameterLayout.choose(
            name, tuple(parameter.shape), parameter.dtype, axis, plan.mesh[axis], whole
        )
    return layouts


@dataclass(frozen=True)
class Slot:
    """Where the model keeps a parameter or buffer: read there at each call, since users exchange them."""

    owner: nn.Module
    attribute: str

    def get(self) -> torch.Tensor:
        value = getattr(self.owner, self.attribute)
        assert isinstance(value, torch.Tensor)
        return value


def slots(model: nn.Module) -> dict[str, Slot]:
    """The place of every parameter and buffer, by every qualified name."""
    found = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for members in (module.named_parameters, module.named_buffers):
            for name, _ in members(recurse=False, remove_duplicate=False):
                found[f"{prefix}.{name}" if prefix else name] = Slot(module, name)
    return found


def replicate(model: nn.Module, mesh: DeviceMesh, device: torch.device) -> None:
    """Exchange the model's parameters for DTensors that are whole on every rank, ties kept.

    All ranks start from the values of the first, in the buffers too. Of a parameter on the meta device one zero on
    `device` stands for all elements, until `lay_out` says which of them lie here.
    """
    exchanged: dict[int, nn.Parameter] = {}
    known = {id(parameter) for parameter in model.parameters()}
    for slot in slots(model).values():
        parameter = slot.get()
        if not isinstance(parameter, nn.Parameter) or id(parameter) not in known:
            continue
        if id(parameter) not in exchanged:
            if parameter.is_meta:
                value = torch.zeros((), dtype=parameter.dtype, device=device).expand(parameter.shape)
            else:
                value = parameter.detach().contiguous()
                _broadcast(value)
            shape, stride = value.shape, torch.empty(value.shape, device="meta").stride()
            replicas = [Replicate()] * mesh.ndim
            distributed = DTensor.from_local(value, mesh, replicas, run_check=False, shape=shape, stride=stride)
            exchanged[id(parameter)] = nn.Parameter(distributed, requires_grad=parameter.requires_grad)
        setattr(slot.owner, slot.attribute, exchanged[id(parameter)])
    for buffer in dict.fromkeys(model.buffers()):
        _broadcast(buffer)


def _broadcast(value: torch.Tensor) -> None:
    if value.numel():
        dist.broadcast(value, src=0)


def lies_here(parameter: torch.Tensor) -> bool:
    """Whether this rank is one of those that hold it, or parts of it."""
    return not isinstance(parameter, DTensor) or parameter.device_mesh.get_coordinate() is not None


def own_slices(tensor: torch.Tensor, layout: ParameterLayout | None) -> tuple[slice, ...]:
    """Where in the whole of a parameter, or of another tensor without layout, that lies what this rank holds of it."""
    if not isinstance(tensor, DTensor) or layout is None:
        return tuple(slice(0, size) for size in tensor.shape)
    mesh = tensor.device_mesh
    return layout.slices({axis: mesh.get_local_rank(axis) for axis in mesh.mesh_dim_names or ()})


@torch.no_grad()
def lay_out(
    model: nn.Module, layouts: Mapping[str, ParameterLayout], mesh: DeviceMesh, *, in_place: bool
) -> dict[str, torch.Tensor]:
    """Have replicated parameters lie over the ranks as their layouts say; the objects stay. Nothing is communicated.

    What lies on other ranks altogether is let alone.
    in_place: keep what a rank's program sees of a parameter allocated, and let the shard be a part of it (ZeRO 1 and
    2). Returns the storage of those, [ranks * shard rows, ...], by name; empty unless `in_place`.
    """
    allocated: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        if not lies_here(parameter):
            continue
        layout = layouts[name]
        storage, distributed = _laid_out(local_tensor(parameter), layout, mesh, in_place)
        if in_place and not layout.is_whole:
            allocated[name] = storage
        redistribute_in_place(parameter, distributed)
        if isinstance(parameter.grad, DTensor):
            parameter.grad = parameter.grad.redistribute(placements=distributed.placements)
    return allocated


def _laid_out(
    whole: torch.Tensor, layout: ParameterLayout, mesh: DeviceMesh, in_place: bool
) -> tuple[torch.Tensor, DTensor]:
    """The storage of what this rank's program sees and, over it or over a copy of this rank's rows, the DTensor.

    No more of a `whole` that is one element for all gets bytes of its own than is kept.
    """
    value = whole
    if layout.splits:
        place = {split.axis: mesh.get_local_rank(split.axis) for split in layout.splits}
        value = layout.part(whole, place).clone(memory_format=torch.contiguous_format)
    if layout.is_whole or in_place:
        value = value.contiguous()
    if layout.is_whole:
        return value, _distributed(value, whole, layout, mesh)
    storage = value.view(layout.rows, *layout.row_shape)
    if layout.is_padded:
        storage = torch.nn.functional.pad(
            storage, [0, 0] * len(layout.row_shape) + [0, layout.gathered_shape[0] - layout.rows]
        )
    local = _rows_of(storage, layout, mesh.get_local_rank(layout.axis))
    if not in_place:
        local = padded_shard(local.clone(), layout).narrow(0, 0, local.shape[0])
    return storage, _distributed(local.view(*layout.shape[: layout.dim], *local.shape), whole, layout, mesh)


def _distributed(local: torch.Tensor, whole: torch.Tensor, layout: ParameterLayout, mesh: DeviceMesh) -> DTensor:
    """The DTensor of the whole parameter of which this rank holds `local`."""
    placements: dict[str, Placement] = {split.axis: Shard(split.dim) for split in layout.splits}
    if layout.dim is not None:
        placements[layout.axis] = Shard(layout.dim)
    assert mesh.mesh_dim_names is not None
    return DTensor.from_local(
        local,
        mesh,
        [placements.get(axis, Replicate()) for axis in mesh.mesh_dim_names],
        run_check=False,
        shape=whole.shape,
        stride=torch.empty(whole.shape, device="meta").stride(),
    )


def _rows_of(storage: torch.Tensor, layout: ParameterLayout, rank: int) -> torch.Tensor:
    """This rank's rows of what its program sees, over the same bytes but with a version counter of their own.

    Filling the rest of it from other ranks must not look like a change of the shard.
    """
    start, rows = layout.local_rows(rank)
    part = storage.narrow(0, start, rows)
    return storage.new_empty(0).set_(part.untyped_storage(), part.storage_offset(), part.shape, part.stride())


def padded_shard(local: torch.Tensor, layout: ParameterLayout) -> torch.Tensor:
    """`local` rows (any shape with their elements) as [shard rows, ...]; zeros behind them where the rank has fewer.

    No copy where the rows are complete, or are followed by their padding in the same storage.
    """
    wanted = torch.Size(layout.shard_shape)
    if local.numel() == wanted.numel():
        return local.view(wanted)
    end = (local.storage_offset() + wanted.numel()) * local.element_size()
    if local.is_contiguous() and local.untyped_storage().nbytes() == end:
        return local.as_strided(wanted, torch.empty(wanted, device="meta").stride())
    rows = local.numel() // max(1, torch.Size(layout.row_shape).numel())
    padding = [0, 0] * len(layout.row_shape) + [0, layout.shard_rows - rows]
    return torch.nn.functional.pad(local.reshape(rows, *layout.row_shape), padding)


def gradient_for(parameter: torch.Tensor, gradient: torch.Tensor, layout: ParameterLayout | None) -> torch.Tensor:
    """The gradient as the parameter is: a DTensor of the same placement, padding cut off; plain for a plain one."""
    if not isinstance(parameter, DTensor):
        return gradient
    local = local_tensor(parameter)
    if layout is not None and not layout.is_whole:
        rows = local.shape[layout.dim or 0]
        gradient = gradient.narrow(0, 0, rows).view(local.shape)
    return distributed_tensor(gradient, parameter)


@torch.no_grad()
def move_parameters(model: nn.Module, offload: Offload, copies: Copies) -> None:
    """Have parameters, or this rank's shards, lie where the plan says: the same objects over other bytes."""
    for parameter in model.parameters():
        local = local_tensor(parameter) if isinstance(parameter, DTensor) else parameter
        storage = local.untyped_storage()
        if storage.nbytes() >= max(1, offload.least_bytes) and local.device.type == "cpu" and offload.place == "disk":
            rows = local.new_empty(0).set_(storage)  # with the padding behind them
            moved = copies.stored(rows, offload.place).wait()
            local.data = moved.as_strided(local.shape, local.stride(), local.storage_offset())


def accept_whole_state(model: nn.Module) -> None:
    """Let `load_state_dict` take whole plain tensors too: each rank keeps its rows."""

    def shard(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        for name, parameter in module.named_parameters(prefix.rstrip("."), remove_duplicate=False):
            value = state.get(name)
            if isinstance(parameter, DTensor) and isinstance(value, torch.Tensor) and not isinstance(value, DTensor):
                value = value.to(parameter.device)
                state[name] = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)

    model.register_load_state_dict_pre_hook(shard)


def whole_parameter(name: str, parameter: nn.Parameter) -> torch.Tensor:
    """All of a parameter of which each rank has a part."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def whole_parameters(
    model: nn.Module, gather: Callable[[str, nn.Parameter], torch.Tensor] = whole_parameter
) -> dict[str, nn.Parameter]:
    """Each parameter, by every name it has, whole and without gradient on every rank; all ranks call this together.

    gather: makes one whole, given by its first name.
    """
    whole: dict[int, nn.Parameter] = {}
    named = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) not in whole:
            whole[id(parameter)] = nn.Parameter(gather(name, parameter).detach(), requires_grad=False)
        named[name] = whole[id(parameter)]
    return named
