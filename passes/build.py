"""Making nodes: value, facts and provenance stated in one place."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from graphopt.ir import Phase, Program, annotate
from graphopt.passes.base import PassContext


class Builder:
    """Inserts nodes into a program on behalf of one pass. Where they go is chosen with `before`."""

    def __init__(self, program: Program, context: PassContext, made_by: str) -> None:
        self.program = program
        self.graph = program.graph
        self.context = context
        self.made_by = made_by

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
        node = self.graph.call_function(target, args, kwargs)
        values = fx.map_arg((args, kwargs), lambda argument: argument.meta["val"])
        with self.context.fake_mode:
            node.meta["val"] = target(*values[0], **values[1])
        return annotate(node, like=like, phase=phase, origin=like.name, made_by=self.made_by, reasons=())

    def fake(self, shape: Sequence[int], dtype: torch.dtype, like: fx.Node) -> torch.Tensor:
        """A fake tensor on the device of `like`."""
        with self.context.fake_mode:
            return torch.empty(tuple(shape), dtype=dtype, device=like.meta["val"].device)
