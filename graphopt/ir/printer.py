"""Programs as text, one line a node, and the difference between two of them."""

import difflib

from torch import fx

from graphopt.ir.facts import facts_of
from graphopt.ir.program import Program
from graphopt.ir.values import described


def format_program(program: Program) -> str:
    """Every input with its role, every node with value, phase and place in the model, every output with its role."""
    lines = [f"program at level {program.level.value}"]
    for role, node in zip(program.inputs, program.placeholders, strict=True):
        lines.append(f"  {node.name}: {described(node.meta.get('val'))} = input ({role})")
    lines += [f"  {format_node(node)}" for node in program.graph.nodes if node.op not in ("placeholder", "output")]
    for output, result in zip(program.outputs, program.results, strict=True):
        lines.append(f"  output ({output}) = {result.name if result is not None else None}")
    return "\n".join(lines) + "\n"


def format_node(node: fx.Node) -> str:
    """One node: name, value, operator, arguments, then phase, module and source line."""
    facts = facts_of(node)
    place = " ".join(filter(None, (facts.phase.value, facts.module, facts.source)))
    made = f" by {facts.made_by}" if facts.made_by not in ("capture", "differentiate") else ""
    call = f"{format_target(node)}({format_arguments(node)})"
    return f"{node.name}: {described(node.meta.get('val'))} = {call}  # {place}{made}"


def format_target(node: fx.Node) -> str:
    """The operator of a call: ``aten.mm.default``, ``getitem``."""
    spelled = str(node.target)
    if "." in spelled and " " not in spelled:
        return spelled
    return spelled if isinstance(node.target, str) else getattr(node.target, "__name__", spelled)


def format_arguments(node: fx.Node) -> str:
    """Positional arguments, then those by keyword."""
    return ", ".join(
        [str(argument) for argument in node.args] + [f"{key}={value}" for key, value in node.kwargs.items()]
    )


def diff(before: str, after: str) -> str:
    """Unified difference of two printed programs; empty if they are equal."""
    return "".join(
        difflib.unified_diff(before.splitlines(keepends=True), after.splitlines(keepends=True), "before", "after", n=2)
    )
