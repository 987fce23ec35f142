"""Checks of the arguments of kernels: each error names the argument, what it is, and what it may be."""

from collections.abc import Sequence

import torch

CPU = torch.device("cpu")
ELEMENTS = (torch.float32, torch.bfloat16)
FLOAT32 = (torch.float32,)


def check(
    name: str,
    tensor: torch.Tensor,
    shape: Sequence[int | None],
    dtypes: Sequence[torch.dtype] = ELEMENTS,
    *,
    is_contiguous: bool = True,
    device: torch.device = CPU,
) -> None:
    """Raises ValueError unless `tensor` lies in the memory of `device`, has one of `dtypes` and has this shape.

    shape: None where any size will do; is_contiguous: else only the elements of its last dimension lie side by side.
    """
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{name} is a {type(tensor).__name__}, not a tensor")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, not on {'the cpu' if device == CPU else device}")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} is {tensor.dtype}, not {' or '.join(map(str, dtypes))}")
    sizes = tensor.shape
    if sizes != shape and (len(sizes) != len(shape) or not _fits(sizes, shape)):
        expected = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} has the shape {list(sizes)}, not [{expected}]")
    if is_contiguous and not tensor.is_contiguous():
        raise ValueError(f"{name} is not contiguous: its strides are {tensor.stride()}")
    if not is_contiguous and tensor.stride(-1) != 1 and sizes[-1] > 1:
        raise ValueError(f"{name} has the stride {tensor.stride(-1)} in its last dimension, not 1")


def _fits(sizes: torch.Size, shape: Sequence[int | None]) -> bool:
    if shape.count(None) == len(shape):  # as most often: checks are much of a short call
        return True
    return all(expected in (None, size) for size, expected in zip(sizes, shape, strict=True))


def check_choice(name: str, given: object, choices: Sequence[object]) -> None:
    """Raises ValueError unless `given` is one of `choices`."""
    if given not in choices:
        raise ValueError(f"{name} is {given!r}, not {' or '.join(map(repr, choices))}")
