"""A program: an fx graph of ATen and registered ops over plain tensors, with a role for each input and output."""

import enum
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import fx

from graphopt.ir.facts import Phase, facts_of
from graphopt.ir.roles import Input, InputKind, Output, OutputKind


class Level(enum.Enum):
    """How far a program is lowered."""

    FORWARD = "forward"  # what the model's forward computes, in composite ops
    STEP = "step"  # forward and backward in flat ATen, every gradient explicit


@dataclass
class Program:
    """A graph with roles. Passes change it in place.

    module: its placeholders align with `inputs`, the elements of its one (flat) output tuple with `outputs`; an output
        may be None (a gradient that does not exist).
    aliases: other names of a tied parameter or buffer -> the name its role carries.
    constants: the values of inputs of kind CONSTANT, by name.
    reduced: whether gradients of parameters are means over the ranks, and no longer of this rank alone.
    """

    module: fx.GraphModule
    inputs: list[Input]
    outputs: list[Output]
    level: Level
    aliases: dict[str, str]
    constants: dict[str, torch.Tensor] = field(default_factory=dict)
    reduced: bool = False

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    @property
    def placeholders(self) -> list[fx.Node]:
        return self.graph.find_nodes(op="placeholder")

    @property
    def output_node(self) -> fx.Node:
        return self.graph.output_node()

    @property
    def results(self) -> tuple[fx.Node | None, ...]:
        """The nodes that `outputs` describes, in order."""
        (values,) = self.output_node.args
        assert isinstance(values, tuple)
        return values  # type: ignore[return-value]

    def set_results(self, nodes: list[fx.Node | None], outputs: list[Output]) -> None:
        """Replace the program's outputs and their roles together."""
        self.output_node.args = (tuple(nodes),)
        self.outputs = list(outputs)

    def nodes_of(self, *kinds: InputKind) -> Iterator[tuple[Input, fx.Node]]:
        """Placeholders of the given kinds, with their roles, in order."""
        for role, node in zip(self.inputs, self.placeholders, strict=True):
            if role.kind in kinds:
                yield role, node

    def results_of(self, *kinds: OutputKind) -> Iterator[tuple[Output, fx.Node | None]]:
        """Outputs of the given kinds, with their roles, in order."""
        for role, node in zip(self.outputs, self.results, strict=True):
            if role.kind in kinds:
                yield role, node

    def compute_nodes(self, phase: Phase | None = None) -> list[fx.Node]:
        """The call nodes, of one phase or of both, in execution order."""
        return [
            node
            for node in self.graph.nodes
            if node.op == "call_function" and (phase is None or facts_of(node).phase is phase)
        ]

    def add_input(self, role: Input, value: torch.Tensor, after: fx.Node | None = None) -> fx.Node:
        """Insert a placeholder with its role; `value` is its fake tensor. Goes last among the inputs by default."""
        placeholders = self.placeholders
        position = placeholders.index(after) + 1 if after is not None else len(placeholders)
        anchor = placeholders[position - 1] if position else None
        with (
            self.graph.inserting_after(anchor) if anchor else self.graph.inserting_before(next(iter(self.graph.nodes)))
        ):
            node = self.graph.placeholder(role.identifier)
        node.meta["val"] = value
        self.inputs.insert(position, role)
        return node

    def remove_input(self, node: fx.Node) -> None:
        """Erase an unused placeholder and its role."""
        self.inputs.pop(self.placeholders.index(node))
        self.graph.erase_node(node)
