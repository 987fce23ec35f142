"""Values from no file: a module knows how to begin, and each rank keeps of that what lies on it.

What a module draws depends on the seed and on its path in the model, so not on the plan, and a rank begins none of
which it holds nothing.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping
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
    device = runtime.collectives.device
    first = aliases(model)
    with failing_together(group):
        for path, module in model.named_modules():
            own = {
                name: p for name, p in module.named_parameters(recurse=False) if first[at(path, name)] == at(path, name)
            }
            here = {name: p for name, p in own.items() if lies_here(p)}
            whole = {name: _blank(p, device) for name, p in here.items()}
            if not here and not any(
                at(path, name) in runtime.unloaded for name, _ in module.named_buffers(recurse=False)
            ):
                continue
            _begin(model, path, module, whole, device, seed)
            for name, parameter in here.items():
                layout = layouts.get(at(path, name))
                local_tensor(parameter).copy_(whole[name][own_slices(parameter, layout)])
        runtime.unloaded.clear()
    runtime.resident.invalidate()


def fill_buffers(model: nn.Module, names: Iterable[str], device: torch.device) -> None:
    """Have modules compute their buffers of these names, as those that are not persistent."""
    for path in dict.fromkeys(name.rpartition(".")[0] for name in names):
        _begin(model, path, model.get_submodule(path), {}, device, 0)


def at(path: str, name: str) -> str:
    """The qualified name of a module's tensor."""
    return f"{path}.{name}" if path else name


def _begin(
    model: nn.Module,
    path: str,
    module: nn.Module,
    parameters: Mapping[str, torch.Tensor],
    device: torch.device,
    seed: int,
) -> None:
    """Have a module initialize itself, with `parameters` for those of its own and none for the others it has.

    Raises GraphoptError if it cannot, or leaves something without a value.
    """
    begin = _beginning(model, module)
    stand_ins = {
        name: parameters.get(name, torch.empty(p.shape, dtype=p.dtype, device="meta"))
        for name, p in module.named_parameters(recurse=False, remove_duplicate=False)
    }
    for _, buffer in module.named_buffers(recurse=False):
        buffer.copy_(_blank(buffer, device))
    with torch.random.fork_rng([device] if device.type == "cuda" else []), device:
        torch.manual_seed(int.from_bytes(hashlib.sha256(f"{seed} {path}".encode()).digest()[:7]))
        if begin is not None:
            with reparametrized(module, {name: nn.Parameter(p, requires_grad=False) for name, p in stand_ins.items()}):
                begin()
    given = {**parameters, **dict(module.named_buffers(recurse=False))}
    blank = [at(path, name) for name, value in given.items() if _is_blank(value)]
    if blank:
        how = "has no reset_parameters" if begin is None else "leaves them without"
        raise GraphoptError(
            f"{listed(blank)} have no values: {type(module).__name__} {how}; give them some before graphopt.compile, or "
            "load them from files that hold them"
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
