"""Forward programs of models."""

import operator
from collections.abc import Iterator

import torch
from torch import fx

from graphopt.capture.arguments import flatten_call
from graphopt.capture.export import capture
from graphopt.ir import Program
from graphopt.passes.base import PassContext
from graphopt.passes.canonicalize import Canonicalize
from tests.support.zoo import Entry


def forward_program(entry: Entry) -> Program:
    """What a model computes, captured and in one spelling."""
    torch.manual_seed(0)
    batch = entry.batch()
    tensors, spec = flatten_call((), batch)
    captured = capture(entry.build(), tensors, spec, list(batch))
    Canonicalize().run(captured.program, PassContext(captured.fake_mode, {"dp": 1}, {}))
    return captured.program


def distinct_calls(program: Program, seen: set[str]) -> Iterator[fx.Node]:
    """Calls that give tensors, one of each operator, shapes and arguments that is not in `seen`, which grows."""
    for node in program.graph.nodes:
        if node.op != "call_function" or node.target is operator.getitem:
            continue
        described = str((node.target, fx.map_arg((node.args, node.kwargs), _described)))
        if described not in seen:
            seen.add(described)
            yield node


def _described(node: fx.Node) -> str:
    value = node.meta["val"]
    return f"{value.dtype}{tuple(value.shape)}" if isinstance(value, torch.Tensor) else str(value)
