"""Tensors that `forward` assigns to attributes of its modules."""

from typing import Any

import torch
from torch import nn

from graphopt.errors import CaptureError


class Assignments:
    """What a module's attributes held before a call of it was captured, and what becomes of those that it assigned.

    Export records an assigned buffer only of the module it was given itself, and loses the others.
    """

    def __init__(self, module: nn.Module) -> None:
        self._owners = list(module.named_modules())
        self._buffers = [dict(owner._buffers) for _, owner in self._owners]
        self._tensors = [_tensors(owner) for _, owner in self._owners]

    def settle(self) -> None:
        """Spell an assigned buffer as a change in place. Raises CaptureError for what cannot be spelled so."""
        places = zip(self._owners, self._buffers, self._tensors, strict=True)
        for (path, owner), buffers, tensors in places:
            for name, value in _tensors(owner).items():
                if tensors.get(name) is not value:
                    raise CaptureError(
                        f"forward keeps a tensor in {_qualified(path, name)}, which is no buffer; register it with "
                        "register_buffer, or return the tensor"
                    )
            for name, value in buffers.items():
                assigned = owner._buffers.get(name)
                if assigned is not value and value is not None:
                    _copy(assigned, value, _qualified(path, name))
                    owner._buffers[name] = value

    def restore(self) -> None:
        """Take back what was assigned to plain attributes."""
        for (_, owner), tensors in zip(self._owners, self._tensors, strict=True):
            for name in _tensors(owner).keys() - tensors.keys():
                delattr(owner, name)
            for name, value in tensors.items():
                setattr(owner, name, value)


def _tensors(owner: nn.Module) -> dict[str, torch.Tensor]:
    """Plain attributes that are tensors."""
    return {name: value for name, value in vars(owner).items() if isinstance(value, torch.Tensor)}


def _copy(assigned: Any, buffer: torch.Tensor, name: str) -> None:
    if not isinstance(assigned, torch.Tensor) or (assigned.dtype, assigned.shape) != (buffer.dtype, buffer.shape):
        what = f"{assigned.dtype} {list(assigned.shape)}" if isinstance(assigned, torch.Tensor) else repr(assigned)
        raise CaptureError(
            f"forward makes {what} of the buffer {name}, which is {buffer.dtype} {list(buffer.shape)}; keep both"
        )
    with torch.no_grad():
        buffer.copy_(assigned)


def _qualified(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
