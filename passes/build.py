"""Making nodes: value, facts and provenance stated in one place."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import fx

from graphopt.ir import Phase, Program, annotate
from graphopt.passes.base import PassContext


class Builder:
    """Inserts nodes into a program on behalf of one pass. Where they go is chosen with `before`.

    Calls that are alike, as those of repeated layers are, share one fake value.
    """

    def __init__(self, program: Program, context: PassContext, made_by: str) -> None:
        self.program = program
        self.graph = program.graph
        self.context = context
        self.made_by = made_by
        self._values: dict[Hashable, Any] = {}

    def before(self, anchor: fx.Node) -> Any:
        """A context in which calls are inserted before `anchor`."""
        return self.graph.inserting_before(anchor)

    def after(self, node: fx.Node) -> Any:
        """A context in which calls are inserted after `node`; behind all inputs, if it is one."""
        following = node.next
        while following.op == "placeholder":
            following = following.next
        return self.graph.inserting_before(following)

    def call(self, target: Callable[..., Any], *args: Any, like: fx.Node, phase: Phase, **kwargs: Any) -> fx.Node:
        """Insert ``target(*args, **kwargs)``, its fake value computed, its facts those of `like` in `phase`."""
        node = self.graph.call_function(target)
        node.args, node.kwargs = args, kwargs  # given to call_function, they are looked through at length
        node.meta["val"] = self._value(target, args, kwargs)
        return annotate(node, like=like, phase=phase, origin=like.name, made_by=self.made_by, reasons=())

    def revalue(self, node: fx.Node) -> None:
        """Compute the fake value of a call anew, whose arguments are others now."""
        node.meta["val"] = self._value(node.target, node.args, node.kwargs)  # type: ignore[arg-type]

    def fake(self, shape: Sequence[int], dtype: torch.dtype, like: fx.Node) -> torch.Tensor:
        """A fake tensor on the device of `like`."""
        with self.context.fake_mode:
            return torch.empty(tuple(shape), dtype=dtype, device=like.meta["val"].device)

    def _value(self, target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = (target, _alike((args, tuple(kwargs.items()))))
        if call not in self._values:
            values = fx.map_arg((args, kwargs), lambda argument: argument.meta["val"])
            with self.context.fake_mode, torch.no_grad():  # values that are alike need not both require a gradient
                self._values[call] = target(*values[0], **values[1])
        return self._values[call]


def _alike(value: Any) -> Hashable:
    """Equal for arguments from which an operator makes values that are alike; symbols by their expression."""
    if isinstance(value, fx.Node):
        return _alike(value.meta["val"])
    if isinstance(value, (list, tuple)):
        return tuple(map(_alike, value))
    if isinstance(value, torch.Tensor):
        return (value.dtype, value.device, _alike(value.shape), _alike(value.stride()))
    return value if type(value) is int else (type(value), str(value))
