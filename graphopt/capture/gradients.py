"""What `forward` says about gradients, kept where export would lose it."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx
from torch.overrides import TorchFunctionMode

from graphopt._torch import (
    FakeTensorMode,
    custom_function,
    pytree,
    set_grad_enabled,
    version_of,
    without_torch_function,
)
from graphopt.errors import CaptureError


class KeepNoGrad(TorchFunctionMode):
    """Makes what ``torch.no_grad()`` does to a gradient part of what is captured: a detach, where it is stopped.

    Export is not told of such regions: it would record subgraphs and forget them when it decomposes them, and with them
    where in the model the rest comes from.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is set_grad_enabled:
            with without_torch_function():
                return function(*args)
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        refuse_custom_functions(given)
        if torch.is_grad_enabled():
            return function(*args, **(kwargs or {}))
        stopped = [(tensor, version_of(tensor)) for tensor in given if tensor.requires_grad]
        result = function(*args, **(kwargs or {}))
        if any(version_of(tensor) != version for tensor, version in stopped):
            raise CaptureError(
                "a value with a gradient is written under no_grad, which leaves its gradient as it was; make a new one"
            )
        return pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, result) if stopped else result


def refuse_custom_functions(values: Iterable[torch.Tensor]) -> None:
    """Raises CaptureError if one of `values` has a gradient that Python code computes: a trace would not have it."""
    for value in values:
        function = custom_function(value)
        if function is not None:
            raise CaptureError(
                f"the gradient of {function.__qualname__}, a torch.autograd.Function, cannot be captured; make it an "
                "operator with torch.library.custom_op and register_autograd"
            )


def reader_of_lost_values(exported: torch.export.ExportedProgram, fake_mode: FakeTensorMode) -> fx.Node | None:
    """The first node that reads a value made in `forward` which export took for a constant, as it does with ``.data``.

    Such a constant has no bytes: torch ends the process when it decomposes one.
    """
    lost = {name for name, value in exported.constants.items() if fake_mode.is_our_fake(value)}
    inputs = exported.graph_signature.inputs_to_lifted_tensor_constants
    for node in exported.graph.find_nodes(op="placeholder"):
        if inputs.get(node.name) in lost:
            readers: list[fx.Node] = sorted(node.users)
            return readers[0] if readers else node
    return None
