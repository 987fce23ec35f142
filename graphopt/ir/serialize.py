"""Programs as plain JSON values, exact, and back.

Everything that a pass may read of a program is kept: nodes in order with their names, operators by public path,
arguments, fake values and facts; roles and ties; constants with their elements; symbolic sizes with the values they had
in the example.
"""

import contextlib
import dataclasses
from typing import Any

import torch
from torch import fx

from graphopt._torch import FakeTensorMode, kernels_in_python, without_guards
from graphopt.errors import GraphoptError
from graphopt.ir.facts import NodeFacts, Phase, annotate, facts_of
from graphopt.ir.layout import Split
from graphopt.ir.program import Level, Program
from graphopt.ir.roles import Input, InputKind, Output, OutputKind
from graphopt.ir.serialize_operators import operator_at, operator_path
from graphopt.ir.serialize_values import ValueReader, ValueWriter, read_tensor, written_tensor


def to_dict(program: Program) -> dict[str, Any]:
    """`program` as JSON values.

    Raises GraphoptError, naming the node, for what cannot be written: operators that take graphs, sizes that depend on
    data, values that are neither tensors nor numbers.
    """
    writer = ValueWriter()
    nodes = []
    for node in program.graph.nodes:
        try:
            nodes.append(_written_node(node, writer))
        except ValueError as error:
            raise GraphoptError(f"{node.name} {error}") from error
    return {
        "level": program.level.value,
        "reduced": program.reduced,
        "aliases": dict(program.aliases),
        "inputs": [_written_role(role) for role in program.inputs],
        "outputs": [_written_role(role) for role in program.outputs],
        "symbols": writer.symbols.declarations,
        "constants": {name: written_tensor(value) for name, value in program.constants.items()},
        "nodes": nodes,
    }


def from_dict(values: dict[str, Any], fake_mode: FakeTensorMode) -> Program:
    """The program that `to_dict` wrote, its values fake tensors of `fake_mode`.

    Raises GraphoptError for an operator that is not there; KeyError, TypeError, ValueError or AttributeError for values
    that are no program's.
    """
    reader = ValueReader(fake_mode, values["symbols"])
    graph = fx.Graph()
    for written in values["nodes"]:
        _read_node(written, graph, reader)
    if values["symbols"]:
        _run_as_captured([node for node in graph.nodes if node.op == "call_function"], fake_mode)
    return Program(
        module=fx.GraphModule(torch.nn.Module(), graph),
        inputs=[Input(InputKind(kind), name, requires_grad) for kind, name, requires_grad in values["inputs"]],
        outputs=[_read_output(written) for written in values["outputs"]],
        level=Level(values["level"]),
        aliases=dict(values["aliases"]),
        constants={name: read_tensor(written) for name, written in values["constants"].items()},
        reduced=values["reduced"],
    )


def _written_role(role: Input | Output) -> list[Any]:
    splits = [dataclasses.astuple(split) for split in role.splits] if isinstance(role, Output) else []
    return [role.kind.value, role.name, role.requires_grad, *([splits] if splits else [])]


def _read_output(written: list[Any]) -> Output:
    kind, name, requires_grad, *splits = written
    return Output(OutputKind(kind), name, requires_grad, tuple(Split(*each) for listed in splits for each in listed))


def _written_node(node: fx.Node, writer: ValueWriter) -> dict[str, Any]:
    written: dict[str, Any] = {"name": node.name, "op": node.op}
    if node.op == "call_function":
        written["target"] = operator_path(node.target)
    elif node.op in ("placeholder", "output"):
        written["target"] = node.target
    else:
        raise ValueError(f"is a {node.op} node; programs hold inputs and calls only")
    written["args"] = [writer.written(argument) for argument in node.args]
    written["kwargs"] = {name: writer.written(argument) for name, argument in node.kwargs.items()}
    written["value"] = writer.written(node.meta.get("val"))
    written["facts"] = _written_facts(facts_of(node))
    return written


def _read_node(written: dict[str, Any], graph: fx.Graph, reader: ValueReader) -> None:
    is_call = written["op"] == "call_function"
    node = graph.create_node(
        written["op"],
        operator_at(written["target"]) if is_call else written["target"],
        tuple(reader.read(argument) for argument in written["args"]),
        {name: reader.read(argument) for name, argument in written["kwargs"].items()},
        written["name"],
    )
    node.meta["val"] = reader.read(written["value"])
    annotate(node, **_read_facts(written["facts"]))
    reader.nodes[node.name] = node


def _run_as_captured(nodes: list[fx.Node], fake_mode: FakeTensorMode) -> None:
    """Let `fake_mode` learn what each call gives, as it did in capture: it asks kernels that keep sizes symbolic then.

    Passes that run a call later get what was learned; run anew, some kernels would bind symbols to the example's sizes.
    """
    values: dict[fx.Node, Any] = {}
    for node in nodes:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: values.get(source, source.meta["val"]))
        # A call that cannot run has nothing to be learned; the verifier says so, with its surroundings.
        with contextlib.suppress(Exception), fake_mode, without_guards(fake_mode), kernels_in_python():
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]


def _written_facts(facts: NodeFacts) -> dict[str, Any]:
    """What differs from the empty record; the values are enums, text, flags and tuples of text."""
    found = {spec.name: getattr(facts, spec.name) for spec in dataclasses.fields(NodeFacts)}
    nothing = NodeFacts()
    return {
        name: value.value if isinstance(value, Phase) else value
        for name, value in found.items()
        if value != getattr(nothing, name)
    }


def _read_facts(written: dict[str, Any]) -> dict[str, Any]:
    return {
        name: Phase(value) if name == "phase" else tuple(value) if isinstance(value, list) else value
        for name, value in written.items()
    }
