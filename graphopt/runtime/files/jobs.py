"""Writes and reads of one tensor: open the file, move block after block, close it.

A file has its final name only while it is whole. A write, the first or a later one, works on ``NAME.part`` and renames
it when all blocks are on their way to the disk; what a process that ended in the middle leaves is a ``.part``, which
nobody reads. (Nothing is forced out of the disk's own cache: against a loss of power there are checkpoints.)
"""

import contextlib
import errno
import os
import secrets
import threading
from abc import ABC, abstractmethod
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import torch

from graphopt.errors import OffloadError
from graphopt.runtime.files.blocks import Blocks, DamagedError
from graphopt.runtime.files.memory import bytes_of
from graphopt.runtime.files.transfer import Transfer
from graphopt.sizes import readable_size


@dataclass(frozen=True)
class Stored:
    """What is known of a file since its last write ended: whoever changes it later is noticed."""

    inode: int
    changed_ns: int
    write: int


@dataclass(frozen=True)
class Place:
    """Where and how a folder's tensors lie. flags: further ones for opening a file."""

    folder: Path
    blocks: Blocks
    flags: int

    def file(self, name: str) -> Path:
        return self.folder / f"{quote(name, safe='')}.tensor"


class Job(ABC):
    """One transfer's way through the threads. What goes wrong on it is told by `finish`, once.

    tensor: contiguous, on the CPU; context: what the caller says of the moment, for messages.
    """

    is_write: bool

    def __init__(self, place: Place, name: str, tensor: torch.Tensor, context: str) -> None:
        self.name = name
        self.error: Exception | None = None
        self._future: Future[list[torch.Tensor]] = Future()
        self.transfer = Transfer(self._future)
        self.blockers = 0  # jobs on the same tensor that have to end before
        self.followers: list[Job] = []
        self._place = place
        self._tensor = tensor
        self._data = bytes_of(tensor)
        self._context = context
        self._path = place.file(name)
        self._file: int | None = None
        self._unfinished = self.blocks
        self._lock = threading.Lock()

    @property
    def blocks(self) -> int:
        return self._place.blocks.count(self._data.numel())

    def open(self, stored: Stored | OffloadError | None) -> None:
        """Before the first block. stored: what the last write left."""
        try:
            self._open(stored)
        except Exception as error:
            self.error = error

    def move(self, index: int, buffer: torch.Tensor) -> bool:
        """Transfer block `index`, unless another one has failed. Returns whether it was the last to be done."""
        try:
            if self.error is None:
                self._move(index, buffer)
        except Exception as error:
            self.error = self.error or error
        with self._lock:
            self._unfinished -= 1
            return self._unfinished == 0

    def close(self) -> Stored | OffloadError | None:
        """After the last block. Returns what is known of the file from now on."""
        try:
            return self._complete() if self.error is None else self._failed(self.error)
        except Exception as error:
            return self._failed(error)
        finally:
            if self._file is not None:
                os.close(self._file)

    def finish(self) -> None:
        """Tell whoever waits, and let go of the tensor before: it may be gone as soon as they know."""
        result = [self._tensor]
        self._tensor = self._data = torch.empty(0)
        if self.error is None:
            self._future.set_result(result)
        else:
            self._future.set_exception(self.error)

    @abstractmethod
    def _open(self, stored: Stored | OffloadError | None) -> None: ...

    @abstractmethod
    def _move(self, index: int, buffer: torch.Tensor) -> None: ...

    @abstractmethod
    def _complete(self) -> Stored | None: ...

    @abstractmethod
    def _abandon(self) -> None: ...

    @property
    def _part(self) -> Path:
        return self._path.with_name(self._path.name + ".part")

    @property
    def _file_size(self) -> int:
        return self._place.blocks.file_size(self._data.numel())

    def _failed(self, error: Exception) -> OffloadError:
        self.error = explained = self._explained(error)
        try:
            self._abandon()
        except OSError as second:
            explained.add_note(str(second))
        return explained

    def _opened(self) -> int:
        assert self._file is not None
        return self._file

    def _explained(self, error: Exception) -> OffloadError:
        doing = f"cannot write {self.name!r} to" if self.is_write else f"cannot read {self.name!r} from"
        why = (os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)) + self._hint(
            error
        )
        explained = OffloadError(f"{self._context}{': ' if self._context else ''}{doing} {self._path}: {why}")
        explained.__cause__ = error
        return explained

    def _hint(self, error: Exception) -> str:
        code = error.errno if isinstance(error, OSError) else None
        if code == errno.ENOENT and not self._place.folder.is_dir():
            return f"; the folder {self._place.folder} is missing"
        if code == errno.ENOENT and self._part.exists():
            return f"; {self._part.name} is what an interrupted write left"
        if code in (errno.ENOSPC, errno.EDQUOT):
            return f"; the file takes {readable_size(self._file_size)}"
        return ""


class Write(Job):
    """The tensor to its file."""

    is_write = True

    def __init__(self, place: Place, name: str, tensor: torch.Tensor, context: str) -> None:
        super().__init__(place, name, tensor, context)
        self._number = secrets.randbits(64)

    def _open(self, stored: Stored | OffloadError | None) -> None:
        with contextlib.suppress(FileNotFoundError):  # a first write
            self._path.rename(self._part)
        self._file = os.open(self._part, os.O_RDWR | os.O_CREAT | self._place.flags, 0o600)
        if os.fstat(self._file).st_size != self._file_size:
            os.ftruncate(self._file, self._file_size)
            _reserve(self._file, self._file_size)

    def _move(self, index: int, buffer: torch.Tensor) -> None:
        self._place.blocks.write(self._opened(), index, self._data, buffer, self._number)

    def _complete(self) -> Stored:
        status = os.fstat(self._opened())
        self._part.rename(self._path)
        return Stored(status.st_ino, status.st_mtime_ns, self._number)

    def _abandon(self) -> None:
        self._part.unlink(missing_ok=True)


class Read(Job):
    """The tensor from its file."""

    is_write = False

    def __init__(self, place: Place, name: str, tensor: torch.Tensor, context: str) -> None:
        super().__init__(place, name, tensor, context)
        self._stored: Stored | None = None
        self._writes: set[int | None] = set()

    def _open(self, stored: Stored | OffloadError | None) -> None:
        if isinstance(stored, OffloadError):
            raise DamagedError(f"its last write failed ({stored})")
        self._stored = stored
        self._file = os.open(self._path, os.O_RDONLY | self._place.flags)
        status = os.fstat(self._file)
        if status.st_size != self._file_size:
            raise DamagedError(f"it has {status.st_size} bytes, not the {self._file_size} of what was written")
        if stored is not None and (stored.inode, stored.changed_ns) != (status.st_ino, status.st_mtime_ns):
            raise DamagedError("something else has changed it since it was written")

    def _move(self, index: int, buffer: torch.Tensor) -> None:
        self._writes.add(self._place.blocks.read(self._opened(), index, self._data, buffer))

    def _complete(self) -> None:
        if self._stored is not None and self._place.blocks.checked:
            self._writes.add(self._stored.write)
        if len(self._writes) > 1:
            raise DamagedError("its blocks come from different writes")

    def _abandon(self) -> None:
        pass


def _reserve(file: int, size: int) -> None:
    """Have the disk set `size` bytes aside, where it can: a full one shows before anything is written."""
    try:
        if size:
            os.posix_fallocate(file, 0, size)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
