"""Shared memory segments of this process, by the kernel's account."""

from pathlib import Path

import torch

_NAME = "memfd:graphopt"


def mapped_segments() -> int:
    """Bytes of the segments that are mapped: this rank's and those of its neighbours."""
    return sum(end - start for start, end in _ranges())


def is_in_segment(tensor: torch.Tensor) -> bool:
    """Whether a tensor's bytes lie in a segment."""
    return any(start <= tensor.data_ptr() < end for start, end in _ranges())


def _ranges() -> list[tuple[int, int]]:
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if _NAME in line]
    bounds = [line.split()[0].split("-") for line in lines]
    return [(int(start, 16), int(end, 16)) for start, end in bounds]
