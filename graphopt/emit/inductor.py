"""Inductor as the executor of a half: compiled at its first call, when the process groups are known."""

from typing import Any

from torch import fx

from graphopt._torch import FakeTensorMode, inductor_compile
from graphopt.emit.module import EmittedFunction
from graphopt.ir import Program
from graphopt.ir.collectives import collective_of
from graphopt.ir.context import OF_RANK
from graphopt.runtime.state import Runtime


def inductor_function(program: Program, fake_mode: FakeTensorMode) -> EmittedFunction:
    """A function that Inductor compiles; its collectives run on the groups of the runtime it is first called with."""
    compiled: list[Any] = []

    def call(inputs: list[Any], runtime: Runtime) -> list[Any]:
        if not compiled:
            module = _bound(program, runtime)
            fakes = [node.meta["val"] for node in program.placeholders]
            compiled.append(inductor_compile(module, fakes, fake_mode))
        results: list[Any] = list(compiled[0](inputs))
        return results

    return call


def _bound(program: Program, runtime: Runtime) -> fx.GraphModule:
    """A copy of the program for this rank: collectives name process groups instead of mesh axes."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(program.graph, {}))
    for node in graph.nodes:
        if collective_of(node) is not None:
            node.args = (*node.args[:-1], runtime.collectives.group_name(node.args[-1]))
        elif node.target in OF_RANK:
            node.target = getattr(runtime.parts, node.target.overloadpacket.__name__)
    return fx.GraphModule(program.module, graph)
