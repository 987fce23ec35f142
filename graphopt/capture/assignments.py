"""Tensors that `forward` assigns to attributes of its modules."""

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from graphopt.errors import CaptureError


@contextlib.contextmanager
def settled(module: nn.Module) -> Iterator[None]:
    """Afterwards, buffers that were assigned inside are as if they had been changed in place.

    Raises CaptureError for what cannot be spelled so: a tensor in a plain attribute, a buffer of another type.
    """
    assignments = _Assignments(module)
    try:
        yield
        assignments.settle()
    finally:
        assignments.restore()


class _Assignments:
    """What a module's attributes held before a call of it was captured, and what becomes of those that it assigned.

    Export records an assigned buffer only of the module it was given itself, and loses the others.
    """

    def __init__(self, module: nn.Module) -> None:
        self._owners = list(module.named_modules())
        self._buffers = [dict(owner._buffers) for _, owner in self._owners]
        self._tensors = [_tensors(owner) for _, owner in self._owners]
        self._names = Counter(id(value) for buffers in self._buffers for value in buffers.values())

    def settle(self) -> None:
        """Copy what was assigned into the buffers, and put them back."""
        for (path, owner), buffers, tensors in zip(self._owners, self._buffers, self._tensors, strict=True):
            kept = {**_tensors(owner), **owner._buffers}
            for name, value in kept.items():
                if name not in buffers and tensors.get(name) is not value:
                    raise CaptureError(
                        f"forward keeps a tensor in {_qualified(path, name)}, which was no buffer before; register it "
                        "with register_buffer in __init__, or return the tensor"
                    )
            for name, buffer in buffers.items():
                assigned = owner._buffers.get(name)
                if buffer is not None and assigned is not buffer:
                    if self._names[id(buffer)] > 1:
                        raise CaptureError(
                            f"forward assigns the buffer {_qualified(path, name)}, which has other names that keep the "
                            "old one; change it in place"
                        )
                    _copy(assigned, buffer, _qualified(path, name))
                    owner._buffers[name] = buffer

    def restore(self) -> None:
        """Take back what was kept elsewhere."""
        for (_, owner), buffers, tensors in zip(self._owners, self._buffers, self._tensors, strict=True):
            for name in owner._buffers.keys() - buffers.keys():
                del owner._buffers[name]
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
