"""A program as it is at one moment, at the cost of a list."""

import dataclasses
from typing import Any

from torch import fx

from graphopt._torch import lazy_graph_module
from graphopt.ir.program import Program


class Snapshot:
    """What a program was, while passes go on to change it in place.

    Nothing is copied but references: arguments of nodes are immutable, so a pass replaces them, and never writes them.
    """

    def __init__(self, program: Program) -> None:
        self._program = dataclasses.replace(
            program,
            inputs=list(program.inputs),
            outputs=list(program.outputs),
            aliases=dict(program.aliases),
            constants=dict(program.constants),
        )
        self._nodes: list[tuple[Any, ...]] = [
            (node, node.name, node.op, node.target, node.args, node.kwargs, dict(node.meta))
            for node in program.graph.nodes
        ]

    def restored(self) -> Program:
        """The program of that moment, with a graph of its own; values and facts are shared.

        Raises KeyError where a node reads one that does not stand before it.
        """
        graph = fx.Graph()
        made: dict[fx.Node, fx.Node] = {}
        for node, name, op, target, args, kwargs, meta in self._nodes:
            own_args, own_kwargs = fx.map_arg((args, kwargs), made.__getitem__)
            made[node] = graph.create_node(op, target, name=name)
            made[node].args, made[node].kwargs = own_args, own_kwargs  # given to create_node, they are looked through
            made[node].meta.update(meta)
        program = self._program
        return dataclasses.replace(
            program,
            module=lazy_graph_module(program.module, graph),
            inputs=list(program.inputs),
            outputs=list(program.outputs),
            aliases=dict(program.aliases),
            constants=dict(program.constants),
        )


def copied(program: Program) -> Program:
    """A program with a graph of its own; values and facts are shared."""
    return Snapshot(program).restored()
