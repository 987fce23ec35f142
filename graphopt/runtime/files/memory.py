"""Memory that direct I/O accepts: it starts at a page and is made of whole pages."""

import math
import mmap
from collections.abc import Sequence

import torch

PAGE = 4096  # bytes; no disk in use asks for more of addresses, offsets and lengths


def whole_pages(size: int) -> int:
    """`size` bytes, rounded up to pages."""
    return -(-size // PAGE) * PAGE


def page_aligned(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of zeros on the CPU that begins at a page; its pages are taken as they are first written."""
    size = math.prod(shape) * dtype.itemsize
    memory = mmap.mmap(-1, max(PAGE, whole_pages(size)), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=torch.uint8)[:size].view(dtype).view(tuple(shape))


def is_page_aligned(tensor: torch.Tensor) -> bool:
    """Whether a contiguous tensor begins at a page and fills its last one."""
    return tensor.data_ptr() % PAGE == 0 and tensor.nbytes % PAGE == 0


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a contiguous tensor on the CPU, [bytes] of uint8; a view."""
    return tensor.detach().view(-1).view(torch.uint8)


def copy_bytes(target: torch.Tensor, source: torch.Tensor) -> None:
    """Fill `target` with `source`, both [n] of uint8; torch would have a team of threads for each thread that asks."""
    target.numpy()[:] = source.numpy()


def buffer_of(data: torch.Tensor) -> memoryview:
    """Bytes ([n] of uint8) as the operating system's calls take them; a view."""
    return data.numpy().data
