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


def is_alike(one: Any, other: Any) -> bool:
    """Whether two tensors have one dtype, shape and strides; symbols compare as expressions, which adds no guard."""
    if not (isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)) or one.dtype != other.dtype:
        return False
    pairs = ((*one.shape, *one.stride()), (*other.shape, *other.stride()))
    return len(pairs[0]) == len(pairs[1]) and all(_is_same_size(a, b) for a, b in zip(*pairs, strict=True))


def _is_same_size(one: int | torch.SymInt, other: int | torch.SymInt) -> bool:
    return one == other if isinstance(one, int) and isinstance(other, int) else str(one) == str(other)


def byte_size(value: Any) -> int:
    """Bytes of a tensor, or of all in a list; 0 for anything else. Symbols count with their size in the example.

    Reading the example's size, not the symbol itself, adds no guard to the capture.
    """
    if isinstance(value, (list, tuple)):
        return sum(map(byte_size, value))
    if not isinstance(value, torch.Tensor):
        return 0
    return math.prod(map(in_example, value.shape)) * value.element_size()


def in_example(size: int | torch.SymInt) -> int:
    """A size as it is in the example."""
    return size if isinstance(size, int) else int(size.node.hint)


def is_contiguous(tensor: torch.Tensor) -> bool:
    """Whether a tensor's elements lie in order without gaps, in the example."""
    below = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        if in_example(size) != 1 and in_example(stride) != below:
            return False
        below *= in_example(size)
    return True


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether a tensor's elements fill their part of memory, each place once, in whatever order; in the example."""
    below = 1
    sizes = [(in_example(stride), in_example(size)) for stride, size in zip(tensor.stride(), tensor.shape, strict=True)]
    if any(size == 0 for _, size in sizes):
        return True
    for stride, size in sorted(sizes):
        if size != 1 and stride != below:
            return False
        below *= size
    return True
