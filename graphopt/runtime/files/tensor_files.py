"""Tensors in the files of a folder, written and read in the background."""

import logging
import os
import queue
import threading
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from graphopt.errors import OffloadError
from graphopt.nearest import nearest
from graphopt.runtime.files.blocks import Blocks
from graphopt.runtime.files.direct import refusal_of_direct
from graphopt.runtime.files.jobs import Job, Place, Read, Stored, Write
from graphopt.runtime.files.memory import PAGE, page_aligned
from graphopt.runtime.files.transfer import Transfer

log = logging.getLogger("graphopt")

_Task = Callable[[torch.Tensor], None]


class TensorFiles:
    """Named tensors on disk, one file each; threads move their blocks, past the page cache where possible.

    Transfers of one tensor take effect in the order in which they were asked for; others overlap. What a transfer finds
    wrong is raised by its `wait`, and by `close` if nobody waited. Tensors in page-aligned memory (`page_aligned`) are
    moved without a copy, others through one buffer of a block for each thread: that is all the memory it takes.
    (There is no code for io_uring: fio reaches no more with it than these threads do; `python -m bench disk` compares.)
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        block_size: int = 4 << 20,
        depth: int = 8,
        checked: bool = False,
        direct: bool = True,
    ) -> None:
        """folder: made if it is missing; block_size: bytes of one request; depth: requests under way at a time.

        checked: keep a checksum of each block beside it, and compare when reading. direct: try direct I/O; without it,
        or where the file system refuses (which is logged), the page cache is used. Raises OffloadError if the folder
        cannot be written, ValueError for sizes that are not possible.
        """
        if block_size <= 0 or block_size % PAGE:
            raise ValueError(
                f"block_size={block_size}: the nearest valid size is {max(1, round(block_size / PAGE)) * PAGE}"
            )
        if depth < 1:
            raise ValueError(f"depth={depth}: at least one request has to be under way")
        self.folder = Path(folder)
        self.is_direct = _prepared(self.folder, direct)
        self._place = Place(self.folder, Blocks(block_size, checked), os.O_DIRECT if self.is_direct else 0)
        self._kinds: dict[str, tuple[torch.dtype, torch.Size]] = {}
        self._stored: dict[str, Stored | OffloadError | None] = {}
        self._under_way: dict[str, list[Job]] = {}
        self._failed: list[Transfer] = []
        self._is_closed = False
        self._lock = threading.Lock()
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        buffers = [page_aligned([self._place.blocks.buffer_size()], torch.uint8) for _ in range(depth)]
        self._threads = [threading.Thread(target=_work, args=(self._tasks, b), daemon=True) for b in buffers]
        for thread in self._threads:
            thread.start()
        self._stop_threads = weakref.finalize(self, _stop, self._tasks, self._threads)

    def write(self, name: str, tensor: torch.Tensor, context: str = "") -> Transfer:
        """Start to write `tensor`, which must stay as it is until the transfer is waited for.

        context: what a message should say of the moment, such as the step. Raises ValueError for a tensor that is not
        on the CPU, or after `close`.
        """
        data = _on_host(name, tensor).resolve_conj().resolve_neg().contiguous()
        job = Write(self._place, name, data, context)
        self._kinds[name] = (data.dtype, data.shape)
        return self._submit(job)

    def read(self, name: str, out: torch.Tensor | None = None, context: str = "") -> Transfer:
        """Start to read what was last written into `out`, of the same dtype and number of elements, or a new tensor.

        What an earlier process left in the folder, with the same `block_size` and `checked`, is read with `out` only.
        Raises OffloadError for an unknown tensor without `out`; ValueError for an `out` that does not fit or is not
        contiguous, and after `close`.
        """
        kind = self._kinds.get(name)
        if out is None:
            if kind is None:
                raise OffloadError(f"{self.folder} holds no tensor {name!r}; {nearest(name, self._kinds)}")
            out = page_aligned(kind[1], kind[0])
        elif kind is not None and (out.dtype, out.numel()) != (kind[0], kind[1].numel()):
            wanted = f"{kind[1].numel()} elements of {kind[0]}"
            raise ValueError(f"{name!r} has {wanted}, out has {out.numel()} of {out.dtype}")
        if not _on_host(name, out).is_contiguous():
            raise ValueError(f"{name!r} cannot be read into a tensor that is not contiguous")
        return self._submit(Read(self._place, name, out, context))

    def __contains__(self, name: object) -> bool:
        """Whether a write of it has been asked for."""
        return name in self._kinds

    def close(self) -> None:
        """Wait for everything and end the threads; the files stay. Raises the first error that no `wait` has raised."""
        with self._lock:
            self._is_closed = True
            under_way = [job.transfer for jobs in self._under_way.values() for job in jobs]
        for transfer in under_way:
            transfer.settle()
        self._stop_threads()
        errors = [error for transfer in self._failed if (error := transfer.unclaimed_error) is not None]
        self._failed.clear()
        if errors:
            if len(errors) > 1:
                errors[0].add_note(f"{len(errors) - 1} more transfers failed")
            raise errors[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        try:
            self.close()
        except OffloadError as second:  # the first one is on its way to the user
            log.error("%s", second)

    def _submit(self, job: Job) -> Transfer:
        with self._lock:
            if self._is_closed:
                raise ValueError(f"{self.folder} was closed before {job.name!r} was asked for")
            before = self._under_way.setdefault(job.name, [])
            blockers = [other for other in before if other.is_write or job.is_write]
            job.blockers = len(blockers)
            for other in blockers:
                other.followers.append(job)
            before.append(job)
            if not blockers:
                self._tasks.put(partial(self._begin, job))
        return job.transfer

    def _begin(self, job: Job, _: torch.Tensor) -> None:
        job.open(self._stored.get(job.name))
        if job.error is not None or not job.blocks:
            self._end(job)
            return
        for index in range(job.blocks):
            self._tasks.put(partial(self._move, job, index))

    def _move(self, job: Job, index: int, buffer: torch.Tensor) -> None:
        if job.move(index, buffer):
            self._end(job)

    def _end(self, job: Job) -> None:
        stored = job.close()
        with self._lock:
            if job.is_write:
                self._stored[job.name] = stored
            if job.error is not None:
                self._failed.append(job.transfer)
            self._under_way[job.name].remove(job)
            if not self._under_way[job.name]:
                del self._under_way[job.name]
            for follower in job.followers:
                follower.blockers -= 1
                if not follower.blockers:
                    self._tasks.put(partial(self._begin, follower))
        job.finish()


def _prepared(folder: Path, direct: bool) -> bool:
    """Make the folder, and find out whether its files are to be opened for direct I/O."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        refusal = refusal_of_direct(folder) if direct else None
    except OSError as error:
        raise OffloadError(f"cannot write to the folder {folder}: {error.strerror}") from error
    if refusal is not None:
        log.warning("files in %s go through the page cache: no direct I/O, %s", folder, refusal)
    return direct and refusal is None


def _on_host(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if tensor.device.type != "cpu":
        raise ValueError(f"{name!r} is on {tensor.device}: files exchange bytes with tensors on the CPU")
    return tensor.detach()


def _work(tasks: "queue.SimpleQueue[_Task | None]", buffer: torch.Tensor) -> None:
    while (task := tasks.get()) is not None:
        task(buffer)
        del task  # it would keep the TensorFiles alive while the thread waits


def _stop(tasks: "queue.SimpleQueue[_Task | None]", threads: list[threading.Thread]) -> None:
    """Also when the process ends: a thread that lets go of a buffer later than the interpreter would take it down."""
    for _ in threads:
        tasks.put(None)
    for thread in threads:
        if thread is not threading.current_thread():
            thread.join()
