"""Memory that direct I/O accepts: it starts at a page and is made of whole pages."""

import math
import mmap
import os
import tempfile
from collections.abc import Sequence

import torch

from graphopt.errors import OffloadError
from graphopt.sizes import readable_size

PAGE = 4096  # bytes; no disk in use asks for more of addresses, offsets and lengths


def whole_pages(size: int) -> int:
    """`size` bytes, rounded up to pages."""
    return -(-size // PAGE) * PAGE


def page_aligned(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of zeros on the CPU that begins at a page; its pages are taken as they are first written."""
    size = math.prod(shape) * dtype.itemsize
    memory = mmap.mmap(-1, max(PAGE, whole_pages(size)), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=torch.uint8)[:size].view(dtype).view(tuple(shape))


def file_backed(folder: str | os.PathLike[str], shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of zeros in an unnamed file of `folder`, mapped: the system keeps in memory what it has room for.

    The disk's space is reserved at once, and free again when the tensor is. Raises OffloadError if there is too little.
    """
    size = math.prod(shape) * dtype.itemsize
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, max(1, size))  # a mapped page without room would end the process
            memory = mmap.mmap(file.fileno(), max(1, size))
    except OSError as error:
        raise OffloadError(f"cannot put {readable_size(size)} aside in {folder}: {error.strerror}") from error
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
