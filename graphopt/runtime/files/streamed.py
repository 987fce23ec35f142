"""State that is too large for memory: it streams by in chunks, each read, changed and written back."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from graphopt.runtime.files.memory import PAGE, page_aligned
from graphopt.runtime.files.tensor_files import TensorFiles
from graphopt.runtime.files.transfer import Transfer

_DTYPE = torch.float32
_GRAIN = PAGE // _DTYPE.itemsize  # elements; shards are cut at multiples, so that their parts begin at pages
_BUFFERS = 3  # one is read, one is changed, one is written


class Part(NamedTuple):
    """Elements `start` to `stop` of a shard. rows: their state, [rows, stop - start], to be changed in place."""

    name: str
    start: int
    stop: int
    rows: torch.Tensor


class _Stretch(NamedTuple):
    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class _Record:
    """What is read and written at once: one tensor on disk, [rows, elements]."""

    name: str
    stretches: tuple[_Stretch, ...]

    @property
    def elements(self) -> int:
        return sum(each.stop - each.start for each in self.stretches)

    def parts(self, chunk: torch.Tensor, names: Collection[str]) -> list[Part]:
        """Those of the shards in `names`, as views of `chunk`."""
        found, position = [], 0
        for name, start, stop in self.stretches:
            if name in names:
                found.append(Part(name, start, stop, chunk[:, position : position + stop - start]))
            position += stop - start
        return found

    def __str__(self) -> str:
        first, *others = self.stretches
        more = f" and {len(others)} more" if others else ""
        return f"state of {first.name!r}, elements {first.start} to {first.stop}{more}"


Change = Callable[[Sequence[Part]], None]


class StreamedState:
    """Rows of float32 for each element of named flat shards, such as an optimizer's moments, on disk.

    A pass takes the memory of three chunks: while one is changed, the next is read and the last written. What was never
    written reads as zeros.
    """

    def __init__(self, files: TensorFiles, name: str, rows: int, chunk_size: int) -> None:
        """name: begins the names of the tensors in `files`; chunk_size: bytes, rounded to whole pages of each row."""
        self._files = files
        self._name = name
        self._rows = rows
        self._capacity = max(1, chunk_size // (rows * PAGE)) * _GRAIN
        self._buffers = [page_aligned([rows * self._capacity], _DTYPE) for _ in range(_BUFFERS)]
        self._records: list[_Record] = []

    def add(self, sizes: Mapping[str, int]) -> None:
        """More shards: their numbers of elements by name."""
        for stretches in _packed(sizes, self._capacity):
            self._records.append(_Record(f"{self._name}{len(self._records)}", tuple(stretches)))

    def update(self, change: Change, names: Collection[str], context: str = "") -> None:
        """Have `change` see, and change in place, the state of the shards in `names`, part by part.

        context: the moment, for messages. Raises OffloadError, and what `change` raises; nothing is under way
        afterwards.
        """
        self._stream(change, names, context, write=True)

    def visit(self, look: Change, names: Collection[str], context: str = "") -> None:
        """`update` without writing: what `look` changes is lost."""
        self._stream(look, names, context, write=False)

    def _stream(self, change: Change, names: Collection[str], context: str, *, write: bool) -> None:
        records = [record for record in self._records if any(each.name in names for each in record.stretches)]
        moments = [f"{context}, {record}" if context else str(record) for record in records]
        pending: list[Transfer | None] = [None] * _BUFFERS  # by buffer

        def fetch(index: int) -> torch.Tensor:
            """Start to fill the next buffer, once what it held is written."""
            slot, record = index % _BUFFERS, records[index]
            _wait(pending[slot])
            chunk = self._buffers[slot][: self._rows * record.elements].view(self._rows, record.elements)
            is_stored = record.name in self._files
            pending[slot] = self._files.read(record.name, chunk, moments[index]) if is_stored else None
            return chunk if is_stored else chunk.zero_()

        try:
            chunks = [fetch(0)] if records else []
            for index, record in enumerate(records):
                _wait(pending[index % _BUFFERS])
                chunks += [fetch(index + 1)] if index + 1 < len(records) else []
                chunk = chunks.pop(0)
                change(record.parts(chunk, names))
                if write:
                    pending[index % _BUFFERS] = self._files.write(record.name, chunk, moments[index])
            for transfer in pending:
                _wait(transfer)
        finally:
            for transfer in pending:
                if transfer is not None:
                    transfer.settle()


def _wait(transfer: Transfer | None) -> None:
    if transfer is not None:
        transfer.wait()


def _packed(sizes: Mapping[str, int], capacity: int) -> Iterator[list[_Stretch]]:
    """Shards end to end, at most `capacity` elements (whole grains) at a time, cut at whole grains of each."""
    stretches: list[_Stretch] = []
    room = capacity
    for name, size in sizes.items():
        start = 0
        while start < size:
            rest = size - start
            taken = rest if rest <= room else room // _GRAIN * _GRAIN
            if taken:
                stretches.append(_Stretch(name, start, start + taken))
            start += taken
            room -= taken
            if rest > taken:
                yield stretches
                stretches, room = [], capacity
    if stretches:
        yield stretches
