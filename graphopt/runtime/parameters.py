"""A model's parameters as DTensors over the ranks, in place, and the bytes below them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from graphopt._torch import distributed_tensor, local_tensor
from graphopt.ir import ParameterLayout
from graphopt.plan import Offload, Plan
from graphopt.runtime.copies import Copies


def choose_layouts(model: nn.Module, plan: Plan) -> dict[str, ParameterLayout]:
    """How each parameter (by its first name) lies over the ranks of a resolved plan."""
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


def distribute(
    model: nn.Module, layouts: Mapping[str, ParameterLayout], mesh: DeviceMesh, *, in_place: bool
) -> dict[str, torch.Tensor]:
    """Exchange the model's parameters for DTensors, ties kept; all ranks start from the values of the first.

    in_place: leave the whole parameter allocated and let the shard be a part of it (ZeRO 1 and 2).
    Returns the storage of those whole parameters, [ranks * shard rows, ...], by name; empty unless `in_place`.
    """
    whole: dict[str, torch.Tensor] = {}
    exchanged: dict[int, nn.Parameter] = {}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for slot in slots(model).values():
        parameter = slot.get()
        if not isinstance(parameter, nn.Parameter) or id(parameter) not in names:
            continue
        if id(parameter) not in exchanged:
            layout = layouts[names[id(parameter)]]
            storage, distributed = _distributed(parameter, layout, mesh[layout.axis], in_place)
            if in_place and not layout.is_whole:
                whole[layout.name] = storage
            exchanged[id(parameter)] = nn.Parameter(distributed, requires_grad=parameter.requires_grad)
        setattr(slot.owner, slot.attribute, exchanged[id(parameter)])
    for buffer in dict.fromkeys(model.buffers()):
        if buffer.device.type != "meta":
            dist.broadcast(buffer, group_src=0, group=_data_group(layouts, mesh))
    return whole


def _data_group(layouts: Mapping[str, ParameterLayout], mesh: DeviceMesh) -> dist.ProcessGroup:
    return mesh.get_group(next(iter(layouts.values())).axis if layouts else 0)


def _distributed(
    parameter: nn.Parameter, layout: ParameterLayout, mesh: DeviceMesh, in_place: bool
) -> tuple[torch.Tensor, DTensor]:
    """The whole storage and, over it or over a copy of this rank's rows, the DTensor."""
    value = parameter.detach()
    if not value.is_contiguous():
        value = value.contiguous()
    if value.device.type != "meta" and value.numel():
        dist.broadcast(value, group_src=0, group=mesh.get_group())
    if layout.is_whole:
        return value, DTensor.from_local(value, mesh, [Replicate()], run_check=False)
    storage = value.view(layout.rows, *layout.row_shape)
    if layout.is_padded:
        storage = torch.nn.functional.pad(
            storage, [0, 0] * len(layout.row_shape) + [0, layout.gathered_shape[0] - layout.rows]
        )
    local = _rows_of(storage, layout, mesh.get_local_rank())
    if not in_place:
        local = padded_shard(local.clone(), layout).narrow(0, 0, local.shape[0])
    placement = Shard(layout.dim or 0)
    shape = (*layout.shape[: layout.dim], *local.shape)
    distributed = DTensor.from_local(
        local.view(shape), mesh, [placement], run_check=False, shape=torch.Size(layout.shape), stride=value.stride()
    )
    return storage, distributed


def _rows_of(storage: torch.Tensor, layout: ParameterLayout, rank: int) -> torch.Tensor:
    """This rank's rows of the whole parameter, over the same bytes but with a version counter of their own.

    Filling the rest of the parameter from other ranks must not look like a change of the shard.
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


def whole_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Each parameter, by every name it has, whole and without gradient on every rank; all ranks call this together."""
    whole: dict[int, nn.Parameter] = {}
    named = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) not in whole:
            value = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            whole[id(parameter)] = nn.Parameter(value.detach(), requires_grad=False)
        named[name] = whole[id(parameter)]
    return named
