"""Programs that only move a value, or attend, run on all ranks."""

from collections.abc import Callable

import torch
from torch import fx

from graphopt._torch import FakeTensorMode, new_fake_mode
from graphopt.inspect.simulate import Simulation
from graphopt.ir import Input, InputKind, Level, Output, OutputKind, Program, context
from graphopt.passes.base import PassContext
from graphopt.passes.differentiate import Differentiate
from graphopt.verify.verifier import verify

Call = tuple[Callable[..., torch.Tensor], tuple[object, ...]]
Values = list[torch.Tensor]  # one for each rank
ATTENTION_SHAPE = (2, 8)  # batch, width


def forward(shape: tuple[int, ...], calls: list[Call]) -> tuple[Program, FakeTensorMode]:
    """A forward program that makes those calls, one of the result of the other."""
    mode, graph = new_fake_mode(), fx.Graph()
    node = graph.placeholder("x")
    with mode:
        node.meta["val"] = torch.empty(shape, dtype=torch.float64)
        for target, arguments in calls:
            value = node.meta["val"]
            node = graph.call_function(target, (node, *arguments))  # type: ignore[arg-type]
            node.meta["val"] = target(value, *arguments)
    graph.output((node,))
    roles = [Input(InputKind.BATCH, "x", requires_grad=True)]
    return Program(fx.GraphModule({}, graph), roles, [Output(OutputKind.USER, "y")], Level.FORWARD, {}), mode


def attention_program(
    ranks: int, rows: int, heads: int, key_heads: int, scale: float | None, dtype: torch.dtype = torch.float64
) -> tuple[Program, FakeTensorMode]:
    """A forward program of one attention over `cp`, in which a rank has so many rows."""
    (batch, width), mode, graph = ATTENTION_SHAPE, new_fake_mode(), fx.Graph()
    given = [graph.placeholder(name) for name in ("query", "key", "value")]
    with mode:
        for node, count in zip(given, (heads, key_heads, key_heads), strict=True):
            node.meta["val"] = torch.empty(batch, count, rows, width, dtype=dtype)
        node = graph.call_function(context.CONTEXT_ATTENTION, (*given, scale, ranks, "cp"))
        node.meta["val"] = context.CONTEXT_ATTENTION(*(each.meta["val"] for each in given), scale, ranks, "cp")
    graph.output((node,))
    roles = [Input(InputKind.BATCH, each.name, requires_grad=True) for each in given]
    return Program(fx.GraphModule({}, graph), roles, [Output(OutputKind.USER, "y")], Level.FORWARD, {}), mode


def step(program: Program, mode: FakeTensorMode, mesh: dict[str, int]) -> None:
    """Make gradients explicit; the program is right before and after."""
    verify(program, mode, mesh)
    Differentiate().run(program, PassContext(mode, mesh, {}, gradient_outputs=frozenset({"y"})))
    verify(program, mode, mesh)


def results(program: Program, mesh: dict[str, int], inputs: list[Values]) -> list[Values]:
    """Of every output its value on each rank."""
    values = dict(zip(program.placeholders, inputs, strict=True))
    values.update(Simulation(program, mesh).run(inputs))
    return [values[node] for node in program.results if node is not None]
