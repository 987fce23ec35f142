"""A digest of what a program computes, independent of the names of its nodes."""

import hashlib
from typing import Any

import torch
from torch import fx

from graphopt.ir.facts import facts_of
from graphopt.ir.program import Program


def structural_hash(program: Program) -> str:
    """Digest of operators, arguments, order, roles, shapes, dtypes and phases; linear in the size of the program."""
    number = {node: index for index, node in enumerate(program.graph.nodes)}
    digest = hashlib.sha256()
    digest.update(repr((program.inputs, program.outputs)).encode())
    for node in program.graph.nodes:
        arguments = _spelled((node.args, node.kwargs), number)
        digest.update(f"{node.op} {node.target if node.op == 'call_function' else ''} {arguments} ".encode())
        digest.update(
            f"{described(node.meta.get('val'))} {facts_of(node).phase.value} {facts_of(node).resident}\n".encode()
        )
    return digest.hexdigest()


def described(value: Any) -> str:
    """Dtype and shape of a tensor, or of each in a list; the type of anything else."""
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, (list, tuple)):
        return f"({', '.join(described(item) for item in value)})"
    return type(value).__name__


def _spelled(value: Any, number: dict[fx.Node, int]) -> str:
    if isinstance(value, fx.Node):
        return f"%{number[value]}"
    if isinstance(value, (list, tuple)):
        return f"[{','.join(_spelled(item, number) for item in value)}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{_spelled(item, number)}' for key, item in value.items())}}}"
    return repr(value)
