"""The arguments of a call as a flat list of named tensors and a hashable rest."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from graphopt._torch import SequenceKey, pytree
from graphopt.errors import CaptureError

_CONSTANTS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.memory_format)


@dataclass(frozen=True)
class CallSpec:
    """What a call is apart from the tensors in it: part of the key of a captured program.

    constants: for each leaf, the Python value the program is specialized to, or `TENSOR`.
    """

    tree: pytree.TreeSpec
    constants: tuple[Any, ...]

    TENSOR = object()

    def rebuild(self, tensors: Sequence[torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The args and kwargs of the call with `tensors` in the places of its tensors."""
        rest = iter(tensors)
        leaves = [next(rest) if constant is CallSpec.TENSOR else constant for constant in self.constants]
        args, kwargs = pytree.tree_unflatten(leaves, self.tree)
        return args, kwargs


def flatten_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[torch.Tensor], CallSpec]:
    """Split a call into its tensors and its `CallSpec`. Raises CaptureError for an argument that is neither."""
    leaves, tree = pytree.tree_flatten((args, kwargs))
    tensors: list[torch.Tensor] = []
    constants: list[Any] = []
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            tensors.append(leaf)
            constants.append(CallSpec.TENSOR)
        elif isinstance(leaf, _CONSTANTS):
            constants.append(leaf)
        else:
            raise CaptureError(
                f"an argument of the call holds a {type(leaf).__module__}.{type(leaf).__qualname__}, which is "
                "neither a tensor nor a plain Python value; register it as a pytree node, or leave it out"
            )
    return tensors, CallSpec(tree, tuple(constants))


def tensor_names(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    """A name for each tensor of the call, by the parameter of `forward` it arrives at: ``input_ids``, ``states[0]``."""
    bound = inspect.signature(forward).bind(*args, **kwargs)
    kinds = {name: parameter.kind for name, parameter in bound.signature.parameters.items()}
    positions: list[str] = []
    for name, value in bound.arguments.items():
        if kinds[name] is inspect.Parameter.VAR_POSITIONAL:
            positions.extend(f"{name}[{i}]" for i in range(len(value)))
        elif len(positions) < len(args):
            positions.append(name)
    names = []
    for path, leaf in pytree.tree_flatten_with_path((args, kwargs))[0]:
        if isinstance(leaf, torch.Tensor):
            _, argument, *rest = path
            start = positions[argument.idx] if isinstance(argument, SequenceKey) else str(argument.key)  # type: ignore[attr-defined]
            names.append(start + pytree.keystr(tuple(rest)))
    return names
