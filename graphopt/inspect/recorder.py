"""What a compilation looks like after capture and after each pass, kept as it goes by."""

import operator
from collections.abc import Hashable
from dataclasses import dataclass, field

from torch import fx

from graphopt.inspect.placement import placements
from graphopt.ir import NodeFacts, ParameterLayout, Program, effect_of, facts_of
from graphopt.ir.printer import format_arguments, format_target
from graphopt.ir.values import byte_size, described
from graphopt.passes.pipeline import PassRecord


@dataclass(frozen=True, slots=True)
class NodeRecord:
    """The state of one node after one pass.

    kind: ``input``, ``call`` or ``output``. target: its operator; the role, of an input or output. inputs: names of the
    nodes it reads. bytes: of its value. The rest are its facts and effect, as text.
    """

    name: str
    kind: str
    target: str
    arguments: str
    inputs: tuple[str, ...]
    value: str
    bytes: int
    placement: str
    effect: str
    facts: NodeFacts

    def __str__(self) -> str:
        call = self.target if self.kind == "input" else f"{self.target}({self.arguments})"
        return f"{self.name}: {self.value} = {call}"


@dataclass(frozen=True)
class Stage:
    """The program after one pass, or after capture.

    nodes: in execution order. identities: for each, a number that a node keeps from stage to stage, and an output
        among programs of one level.
    """

    made_by: PassRecord
    level: str
    nodes: list[NodeRecord] = field(repr=False)
    identities: list[int] = field(repr=False)

    @property
    def name(self) -> str:
        return self.made_by.name


class Recorder:
    """An observer of a compilation. layouts: parameter name -> how it lies over the ranks; the compilation fills it."""

    def __init__(self) -> None:
        self.stages: list[Stage] = []
        self.program: Program | None = None
        self.layouts: dict[str, ParameterLayout] = {}
        self._identity: dict[Hashable, int] = {}
        self._known: dict[fx.Node, tuple[tuple[object, ...], NodeRecord]] = {}

    def observe(self, record: PassRecord, program: Program) -> None:
        if record.name == "capture":  # a compilation that was given up came before
            self.stages.clear()
        self.program = program
        roles = {node: f"input ({role})" for role, node in zip(program.inputs, program.placeholders, strict=True)}
        placement = placements(program, self.layouts)
        nodes = [node for node in program.graph.nodes if node.op != "output"]
        records = [self._recorded(node, roles.get(node, ""), placement[node]) for node in nodes]
        identities = [self._identity.setdefault(node, len(self._identity)) for node in nodes]
        for index, (role, result) in enumerate(zip(program.outputs, program.results, strict=True)):
            records.append(_output(index, str(role), result))
            identities.append(self._identity.setdefault((program.level, role), len(self._identity)))
        self.stages.append(Stage(record, program.level.value, records, identities))

    def _recorded(self, node: fx.Node, role: str, placement: str) -> NodeRecord:
        """The record of a node: the one there is, if nothing has changed since."""
        facts, value = facts_of(node), node.meta.get("val")
        state = (node.target, node.args, node.kwargs, value, facts, role, placement)
        known = self._known.get(node)
        if known is not None and known[0][5:] == state[5:] and all(map(operator.is_, known[0][:5], state[:5])):
            return known[1]
        is_input = node.op == "placeholder"
        record = NodeRecord(
            name=node.name,
            kind="input" if is_input else "call",
            target=role if is_input else format_target(node),
            arguments="" if is_input else format_arguments(node),
            inputs=tuple(source.name for source in node.all_input_nodes),
            value=described(value),
            bytes=byte_size(value),
            placement=placement,
            effect="" if is_input else effect_of(node).value,
            facts=facts,
        )
        self._known[node] = (state, record)
        return record


def _output(index: int, role: str, result: fx.Node | None) -> NodeRecord:
    value = result.meta.get("val") if result is not None else None
    return NodeRecord(
        name=f"output_{index}",
        kind="output",
        target=f"output ({role})",
        arguments=result.name if result is not None else "None",
        inputs=(result.name,) if result is not None else (),
        value=described(value),
        bytes=byte_size(value),
        placement="",
        effect="",
        facts=facts_of(result) if result is not None else NodeFacts(),
    )
