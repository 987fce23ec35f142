"""What a node's value is: its type in words, its size in bytes."""

import math
from typing import Any

import torch


def described(value: Any) -> str:
    """Dtype and shape of a tensor, or of each in a list; the type of anything else."""
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, (list, tuple)):
        return f"({', '.join(described(item) for item in value)})"
    return type(value).__name__


def byte_size(value: Any) -> int:
    """Bytes of a tensor, or of all in a list; 0 for anything else. Symbols count with their size in the example.

    Reading the example's size, not the symbol itself, adds no guard to the capture.
    """
    if isinstance(value, (list, tuple)):
        return sum(map(byte_size, value))
    if not isinstance(value, torch.Tensor):
        return 0
    return math.prod(s if isinstance(s, int) else int(s.node.hint) for s in value.shape) * value.element_size()
