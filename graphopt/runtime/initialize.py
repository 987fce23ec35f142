"""Values from no file: a module knows how to begin, and each rank keeps of that what lies on it.

What a module draws depends on the seed and on its path in the model, so not on the plan, and a rank begins none of
which it holds nothing.
"""

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from graphopt._torch import local_tensor, reparametrized
from graphopt.errors import GraphoptError
from graphopt.nearest import listed
from graphopt.runtime.agreement import exchanged, failing_together
from graphopt.runtime.parameters import lies_here, own_slices
from graphopt.runtime.state import Runtime
from graphopt.runtime.unloaded import aliases


@torch.no_grad()
def init_weights(model: nn.Module, runtime: Runtime) -> None:
    """As `graphopt.init_weights` says."""
    layouts = runtime.require_settled()
    group = dist.group.WORLD if dist.is_initialized() else None
    drawn = int(torch.randint(1 << 62, ()))
    seed = drawn if group is None else exchanged(drawn, group)[0]
    device, first = runtime.collectives.device, aliases(model)
    with failing_together(group):
        for path, module in model.named_modules():
            named = {at(path, name): p for name, p in module.named_parameters(recurse=False)}
            own = {name: p for name, p in named.items() if first[name] == name and lies_here(p)}
            buffers = runtime.unloaded & {at(path, name) for name, _ in module.named_buffers(recurse=False)}
            if not own and not buffers:
                continue
            whole = {name: _blank(parameter, device) for name, parameter in own.items()}
            _begin(model, path, module, whole, buffers, device, seed)
            for name, parameter in own.items():
                local_tensor(parameter).copy_(whole[name][own_slices(parameter, layouts[name])])
        runtime.unloaded.clear()
    runtime.resident.invalidate()


@torch.no_grad()
def compute_buffers(model: nn.Module, names: Iterable[str], device: torch.device) -> None:
    """Have modules give their buffers of these names, which no file has, the values they begin with."""
    names = set(names)
    for path in sorted({name.rpartition(".")[0] for name in names}):
        module = model.get_submodule(path)
        buffers = names & {at(path, name) for name, _ in module.named_buffers(recurse=False)}
        _begin(model, path, module, {}, buffers, device, 0)


def at(path: str, name: str) -> str:
    """The qualified name of a module's tensor."""
    return f"{path}.{name}" if path else name


def _begin(
    model: nn.Module,
    path: str,
    module: nn.Module,
    parameters: Mapping[str, torch.Tensor],
    buffers: Collection[str],
    device: torch.device,
    seed: int,
) -> None:
    """Have a module initialize itself, with `parameters` for those of its own and none for others that it has.

    buffers: its own without a value. Both by qualified name. Raises GraphoptError for one that is left without.
    """
    stand_ins = {
        name: nn.Parameter(parameters.get(at(path, name), torch.empty_like(p, device="meta")), requires_grad=False)
        for name, p in module.named_parameters(recurse=False, remove_duplicate=False)
    }
    own = {at(path, name): name for name, _ in module.named_buffers(recurse=False, remove_duplicate=False)}
    for name in buffers:
        setattr(module, own[name], _blank(getattr(module, own[name]), device))
    begin = _beginning(model, module)
    if begin is not None:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), device:
            torch.manual_seed(int.from_bytes(hashlib.sha256(f"{seed} {path}".encode()).digest()[:7]))
            with reparametrized(module, stand_ins):
                begin()
    given = {**parameters, **{name: getattr(module, own[name]) for name in buffers}}
    blank = [name for name, value in given.items() if _is_blank(value)]
    if blank:
        how = "has no reset_parameters" if begin is None else "leaves them without"
        raise GraphoptError(
            f"{listed(blank)} on the meta device need values: {type(module).__name__} {how}; give them some before "
            "graphopt.compile, or load them from files that hold them"
        )


def _beginning(model: nn.Module, module: nn.Module) -> Callable[[], Any] | None:
    """How a module initializes itself: by a method of its own or, in Transformers, of the model."""
    of_model = getattr(model, "_init_weights", None)
    if callable(of_model):
        return lambda: of_model(module)
    return getattr(module, "reset_parameters", None)


def _blank(like: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of this shape and dtype with values that none begins with, where there are such."""
    value = torch.empty(like.shape, dtype=like.dtype, device=device)
    if like.dtype.is_floating_point or like.dtype.is_complex:
        return value.fill_(float("nan"))
    return value.fill_(0 if like.dtype == torch.bool else torch.iinfo(like.dtype).min)


def _is_blank(value: torch.Tensor) -> bool:
    """Whether some elements are as `_blank` made them. Of booleans and unsigned numbers that cannot be seen."""
    if value.dtype.is_floating_point or value.dtype.is_complex:
        return bool(value.isnan().any())
    return value.dtype.is_signed and bool((value == torch.iinfo(value.dtype).min).any())
