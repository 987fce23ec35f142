"""What launchers of all kernels share: tables of tiles, rows of a tensor, the launch itself."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

_MULTIPROCESSORS = 132  # of what is compiled for without being there: an H100


class Tile(NamedTuple):
    """What a program holds at once, for rows up to a width; warps: of 32 threads."""

    width: int
    rows: int
    warps: int


def tile_for(tiles: Sequence[Tile], width: int) -> Tile | None:
    """The first tile of a table whose rows are wide enough; None if none are."""
    return next((tile for tile in tiles if width <= tile.width), None)


def power_of_two(size: int) -> int:
    """The least power of two that is not below `size`."""
    return 1 << max(0, size - 1).bit_length()


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """`x` as [rows, width], any stride between rows, elements of a row side by side; copied only where it must be."""
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def multiprocessors(device: torch.device) -> int:
    """How many a GPU has; a usual number for tensors that are on none."""
    if device.type != "cuda":
        return _MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def launch(kernel: Any, programs: int, x: torch.Tensor, *arguments: Any, warps: int, **constants: Any) -> None:
    """Run a kernel on the device of its first argument; without a program there is nothing to run."""
    if programs:
        with torch.cuda.device_of(x):
            kernel[(programs,)](x, *arguments, num_warps=warps, enable_fp_fusion=True, **constants)
