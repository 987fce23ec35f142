"""A digest of what a program computes, independent of the names of its nodes."""

import hashlib
from typing import Any

from torch import fx

from graphopt._torch import OpOverload
from graphopt.ir.facts import facts_of
from graphopt.ir.program import Program
from graphopt.ir.values import described


def structural_hash(program: Program) -> str:
    """Digest of level, operators, arguments, order, roles, ties, shapes, dtypes and phases; linear in the program.

    The same in every process.
    """
    number = {node: index for index, node in enumerate(program.graph.nodes)}
    digest = hashlib.sha256()
    digest.update(f"{program.level.value} {sorted(program.aliases.items())} {sorted(program.constants)}\n".encode())
    digest.update(repr((program.inputs, program.outputs)).encode())
    for node in program.graph.nodes:
        facts = facts_of(node)
        digest.update(f"{node.op} {_operator(node)} {_spelled((node.args, node.kwargs), number)} ".encode())
        digest.update(f"{described(node.meta.get('val'))} {facts.phase.value} {facts.resident}\n".encode())
    return digest.hexdigest()


def _operator(node: fx.Node) -> str:
    """What a node calls or fetches; the target of an input or output is but a name."""
    target = node.target
    if node.op in ("placeholder", "output"):
        return ""
    if isinstance(target, (str, OpOverload)):
        return str(target)
    return f"{target.__module__}.{target.__qualname__}"


def _spelled(value: Any, number: dict[fx.Node, int]) -> str:
    if isinstance(value, fx.Node):
        return f"%{number[value]}"
    if isinstance(value, (list, tuple)):
        return f"[{','.join(_spelled(item, number) for item in value)}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{_spelled(item, number)}' for key, item in value.items())}}}"
    if isinstance(value, slice):
        return f"slice{_spelled((value.start, value.stop, value.step), number)}"
    return repr(value)
