"""How the bytes of a tensor lie in its file, and the transfer of one block of them.

    block 0 · trailer 0 · block 1 · trailer 1 · … · last block, zeros up to a whole page · its trailer

The trailer, a page, is there if the blocks are checked: the block's CRC-32 and the number of the write that it is part
of. A block and its trailer are one call of the operating system.
"""

import os
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from graphopt.runtime.files.memory import PAGE, buffer_of, copy_bytes, is_page_aligned, whole_pages

_TRAILER = struct.Struct("<IQ")


class DamagedError(Exception):
    """A file does not hold what was written; the message says what is wrong with it."""


@dataclass(frozen=True)
class Blocks:
    """size: bytes of a block, whole pages; checked: whether each has a trailer."""

    size: int
    checked: bool

    def count(self, size: int) -> int:
        """Blocks that `size` bytes make."""
        return -(-size // self.size)

    def file_size(self, size: int) -> int:
        """Bytes of the file that holds `size` bytes of a tensor."""
        return whole_pages(size) + self.count(size) * self._trailer

    def buffer_size(self) -> int:
        """Bytes of the buffer that a transfer wants."""
        return self.size + self._trailer

    def write(self, file: int, index: int, data: torch.Tensor, buffer: torch.Tensor, write: int) -> None:
        """Write block `index` of `data` ([bytes]) as a part of the write numbered `write` (64 bits).

        `buffer` ([buffer_size], page-aligned) is used where `data` does not lie as direct I/O wants it. Raises OSError.
        """
        part = self._part(data, index)
        pages = part
        if not is_page_aligned(part):
            pages = buffer[: whole_pages(part.numel())]
            copy_bytes(pages[: part.numel()], part)
            pages[part.numel() :].zero_()
        views = [buffer_of(pages)]
        if self.checked:
            trailer = buffer_of(buffer[self.size :])
            _TRAILER.pack_into(trailer, 0, zlib.crc32(views[0]), write)
            views.append(trailer)
        _transfer(os.pwritev, file, views, self._offset(index))

    def read(self, file: int, index: int, data: torch.Tensor, buffer: torch.Tensor) -> int | None:
        """Read block `index` into its place in `data`. Returns the number of the write it comes from, if checked.

        Raises DamagedError if the file ends before the block does or if the block is not what was written; OSError.
        """
        part = self._part(data, index)
        is_direct = is_page_aligned(part)
        views = [buffer_of(part if is_direct else buffer[: whole_pages(part.numel())])]
        if self.checked:
            views.append(buffer_of(buffer[self.size :]))
        _transfer(_read_pages, file, views, self._offset(index))
        write = self._verified(index, views) if self.checked else None
        if not is_direct:
            copy_bytes(part, buffer[: part.numel()])
        return write

    @property
    def _trailer(self) -> int:
        return PAGE if self.checked else 0

    def _offset(self, index: int) -> int:
        return index * (self.size + self._trailer)

    def _part(self, data: torch.Tensor, index: int) -> torch.Tensor:
        return data[index * self.size : (index + 1) * self.size]

    def _verified(self, index: int, views: Sequence[memoryview]) -> int:
        written, write = _TRAILER.unpack_from(views[1], 0)
        found = zlib.crc32(views[0])
        if found != written:
            raise DamagedError(
                f"block {index} (at byte {self._offset(index)}) has checksum {found:08x}, {written:08x} was written"
            )
        return int(write)


def _read_pages(file: int, views: Sequence[memoryview], offset: int) -> int:
    """Part of a page is the end of the file: asked for what follows it, direct I/O would complain of the offset."""
    return os.preadv(file, views, offset) // PAGE * PAGE


def _transfer(
    call: Callable[[int, Sequence[memoryview], int], int], file: int, views: Sequence[memoryview], offset: int
) -> None:
    """Repeat `call` until all `views` are transferred: the system may do less than it is asked."""
    rest = list(views)
    while rest:
        moved = call(file, rest, offset)
        if not moved:
            raise DamagedError(f"the file ends at byte {offset}, {sum(map(len, rest))} bytes too early")
        offset += moved
        while rest and moved >= len(rest[0]):
            moved -= len(rest.pop(0))
        if rest:
            rest[0] = rest[0][moved:]
