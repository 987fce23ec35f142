"""Shared memory segments and mapped files of this process, by the kernel's account."""

from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

_NAME = "memfd:graphopt"


def mapped_segments() -> int:
    """Bytes of the segments that are mapped: this rank's and those of its neighbours."""
    return sum(end - start for start, end in _ranges(_NAME))


def is_in_segment(tensor: torch.Tensor) -> bool:
    """Whether a tensor's bytes lie in a segment."""
    return any(start <= tensor.data_ptr() < end for start, end in _ranges(_NAME))


def _ranges(name: str) -> list[tuple[int, int]]:
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if name in line]
    bounds = [line.split()[0].split("-") for line in lines]
    return [(int(start, 16), int(end, 16)) for start, end in bounds]


def is_in_file(tensor: torch.Tensor) -> bool:
    """Whether a tensor's bytes lie in a file that is mapped, of this process alone."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return any(start <= local.data_ptr() < end for start, end in _ranges(" (deleted)") if local.numel())
