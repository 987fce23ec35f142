"""Models on the meta device: which of their tensors have no values yet, and where those will be."""

import torch
from torch import nn

from graphopt.errors import GraphoptError
from graphopt.runtime.parameters import slots


def home(model: nn.Module, device: torch.device | str | None) -> torch.device:
    """Where the model runs: where its parameters are, or for one on the meta device `device`, by default torch's.

    Raises GraphoptError where that is not told, or is told of a model that is somewhere already.
    """
    first = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    if first.type != "meta":
        if device is not None and torch.device(device) != first:
            raise GraphoptError(f"device={device} is for a model on the meta device, this one is on {first}; move it")
        return first
    chosen = torch.get_default_device() if device is None else torch.device(device)
    if chosen.type == "meta":
        raise GraphoptError("this model is on the meta device; say graphopt.compile(..., device=...), as 'cpu'")
    return chosen


def without_values(model: nn.Module) -> set[str]:
    """First names of the parameters and buffers that are on the meta device."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name for name, tensor in tensors if tensor.is_meta}


def leave_meta(model: nn.Module, device: torch.device, *, parameters: bool) -> None:
    """Exchange buffers that are on the meta device for zeros on `device`, and `parameters` if so; ties are kept."""
    exchanged: dict[int, torch.Tensor] = {}
    for slot in slots(model).values():
        tensor = slot.get()
        is_parameter = isinstance(tensor, nn.Parameter)
        if not tensor.is_meta or (is_parameter and not parameters):
            continue
        if id(tensor) not in exchanged:
            value = torch.zeros_like(tensor, device=device, requires_grad=False)
            exchanged[id(tensor)] = nn.Parameter(value, tensor.requires_grad) if is_parameter else value
        setattr(slot.owner, slot.attribute, exchanged[id(tensor)])


def aliases(model: nn.Module) -> dict[str, str]:
    """The first name of every parameter and buffer, by each name it has."""
    first: dict[int, str] = {}
    found = {}
    for members in (model.named_parameters, model.named_buffers):
        for name, tensor in members(remove_duplicate=False):
            found[name] = first.setdefault(id(tensor), name)
    return found


def persistent(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and those buffers that a state dict has, by first name."""
    first = aliases(model)
    kept = model.state_dict(keep_vars=True)
    return {first[name]: value for name, value in kept.items() if name in first}


def note_loaded(model: nn.Module, unloaded: set[str]) -> None:
    """Have `load_state_dict` take from `unloaded` what it is given values for."""

    def note(module: nn.Module, state: dict[str, torch.Tensor], *_: object) -> None:
        names = aliases(module)
        unloaded.difference_update(names[name] for name in state if name in names)

    model.register_load_state_dict_pre_hook(note)
