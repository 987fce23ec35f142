"""What a captured program assumed of the call, the model and its surroundings."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from graphopt._torch import shape_guards, shape_guards_hold
from graphopt.capture.arguments import CallSpec
from graphopt.capture.export import Capture
from graphopt.capture.surroundings import Surroundings
from graphopt.ir import InputKind

_SCALARS = (bool, int, float, str, type(None))
_Place = tuple[str, dict[str, Any], str]


@dataclass(frozen=True)
class CallKey:
    """What must be equal for a program to serve a call, apart from sizes."""

    spec: CallSpec
    tensors: tuple[tuple[torch.dtype, torch.device, int, bool, tuple[int, ...] | None], ...]
    modes: tuple[bool, ...]
    trainable: tuple[bool, ...]
    surroundings: Surroundings


class ModelState:
    """Reads, quickly, what of a model belongs to the key: modes, trainable parameters, Python attributes."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = list(model.modules())
        self._parameters = list(dict.fromkeys(name for name, _ in model.named_parameters()))
        self._model = model

    def key(self, spec: CallSpec, tensors: list[torch.Tensor]) -> CallKey:
        device = tensors[0].device.type if tensors else "cpu"
        return CallKey(
            spec,
            tuple((t.dtype, t.device, t.dim(), t.requires_grad, _unusual_strides(t)) for t in tensors),
            tuple(module.training for module in self._modules),
            tuple(parameter.requires_grad for parameter in self._model.parameters()),
            Surroundings.now(device),
        )

    def attributes(self) -> Iterator[_Place]:
        """Name, dictionary and key of each plain Python value that `forward` could read off the model."""
        seen: set[int] = set()
        for path, module in self._model.named_modules():
            yield from _scalars(path, vars(module))
            for name, value in vars(module).items():
                if name.startswith("_") or id(value) in seen or isinstance(value, (nn.Module, type)):
                    continue
                if hasattr(value, "__dict__"):
                    seen.add(id(value))
                    yield from _scalars(f"{path}.{name}" if path else name, vars(value))


def _unusual_strides(tensor: torch.Tensor) -> tuple[int, ...] | None:
    """A program may read a contiguous tensor in ways that another layout does not allow."""
    return None if tensor.is_contiguous() else tensor.stride()


def _scalars(path: str, values: dict[str, Any]) -> Iterator[_Place]:
    for name, value in values.items():
        if isinstance(value, _SCALARS) and name != "training":
            yield f"{path}.{name}" if path else name, values, name


class AttributeGuard:
    """The Python attributes of a model as a program was captured with them."""

    def __init__(self, state: ModelState, forward: Any) -> None:
        self._held = [(name, values, key, values[key]) for name, values, key in state.attributes()]
        self._model = state._model
        self._forward = _function(forward)

    def forget_changed(self) -> None:
        """Leave out what capture itself changed: a counter that `forward` advances is no assumption."""
        self._held = [held for held in self._held if held[1].get(held[2]) == held[3]]

    def broken(self) -> str | None:
        """What has changed since, in words; None if nothing has."""
        if _function(self._model.forward) is not self._forward:
            return "forward was exchanged"
        for name, values, key, value in self._held:
            now = values.get(key)
            if now is not value and now != value:
                return f"{name} changed from {value!r} to {now!r}"
        return None


def _function(forward: Any) -> Any:
    return getattr(forward, "__func__", forward)


class ShapeGuard:
    """Which sizes of the batch tensors a program serves. Made when all passes have run, for they assume sizes too."""

    def __init__(self, captured: Capture) -> None:
        fakes = [node.meta["val"] for _, node in captured.program.nodes_of(InputKind.BATCH)]
        self._fake_mode = captured.fake_mode
        self._names = captured.names
        self._sizes = [tuple(s if isinstance(s, int) else None for s in fake.shape) for fake in fakes]
        symbolic = any(size is None for sizes in self._sizes for size in sizes)
        self._expression = shape_guards(self._fake_mode, fakes) if symbolic else None

    def broken(self, tensors: list[torch.Tensor]) -> str | None:
        """The first tensor that does not fit, in words; None if all do."""
        for name, tensor, sizes in zip(self._names, tensors, self._sizes, strict=True):
            for size, wanted in zip(tensor.shape, sizes, strict=True):
                if wanted is not None and size != wanted:
                    shape = tuple("any" if s is None else s for s in sizes)
                    return f"{name} has shape {tuple(tensor.shape)} where {shape} was captured"
        if self._expression and not shape_guards_hold(self._fake_mode, self._expression, tensors):
            return f"the sizes break what capture assumed of symbolic ones: {self._expression}"
        return None
