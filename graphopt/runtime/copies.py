"""Copies of tensors to memory of the host or to files, and back, beside what is computed."""

import functools
import itertools
import logging
import tempfile
import weakref
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from graphopt.errors import OffloadError
from graphopt.ir.values import is_dense
from graphopt.runtime.files import TensorFiles, file_backed, working_folder
from graphopt.runtime.files.memory import bytes_of, copy_bytes

log = logging.getLogger("graphopt")


class Kept:
    """A tensor elsewhere. It is there as long as this object is."""

    def __init__(self, back: "Callable[[], Arriving]") -> None:
        self.back = back


class Leaving:
    """A copy under way to elsewhere; the tensor that leaves must stay as it is until `wait` has returned."""

    def __init__(self, wait: Callable[[], object], kept: Kept) -> None:
        self._wait = wait
        self._kept = kept

    def wait(self) -> Kept:
        """Raises OffloadError if the copy failed."""
        self._wait()
        return self._kept


class Arriving:
    """A copy under way into `tensor`, which has its elements once `wait` has returned."""

    def __init__(self, tensor: torch.Tensor, wait: Callable[[], object]) -> None:
        self.tensor = tensor
        self._wait = wait

    def wait(self) -> torch.Tensor:
        """Raises OffloadError if the copy failed."""
        self._wait()
        return self.tensor


class Place(ABC):
    """Where tensors of one device are kept."""

    @abstractmethod
    def out(self, value: torch.Tensor, name: str) -> Leaving:
        """Start to copy `value`, whose elements lie without gaps. name: what messages call it."""


class Copies:
    """Starts copies on behalf of emitted programs. folder: for files; made at the first of them."""

    def __init__(self, device: torch.device, folder: Path) -> None:
        self._device = device
        self._folder = folder
        self._places: dict[str, Place] = {}

    def out(self, value: torch.Tensor, place: str, name: str) -> Leaving:
        """Start to copy `value` to ``host`` or ``disk``. name: what messages call it."""
        if place not in self._places:
            self._places[place] = self._made(place)
        return self._places[place].out(value.detach(), name)

    def back(self, kept: Kept) -> Arriving:
        """Start to copy back what has left, into new memory of the device it was on."""
        return kept.back()

    def stored(self, value: torch.Tensor, place: str) -> Arriving:
        """Start to copy `value` to a tensor of its own that lies at a place and stays there; on the CPU only."""
        target = self.allocated(value, place)
        return Arriving(target, self._memory.copied(target, value.detach()))

    def fetched(self, stored: torch.Tensor) -> Arriving:
        """Start to copy a tensor that lies somewhere into new memory of the device; on the CPU only."""
        target = torch.empty_like(stored)
        return Arriving(target, self._memory.copied(target, stored.detach()))

    def allocated(self, like: torch.Tensor, place: str) -> torch.Tensor:
        """Room for such a tensor at a place. On disk it is a mapped file: the system keeps in memory what it can."""
        if place == "host":
            return torch.empty_like(like)
        return file_backed(self._working.name, [like.numel()], like.dtype).as_strided(like.shape, like.stride())

    @functools.cached_property
    def _working(self) -> "tempfile.TemporaryDirectory[str]":
        return working_folder(self._folder)

    @functools.cached_property
    def _memory(self) -> "HostMemory":
        return HostMemory()

    def _made(self, place: str) -> Place:
        host = self._memory if self._device.type == "cpu" else PinnedMemory(self._device)
        if place == "host":
            return host
        files = Files(self._working)
        return files if isinstance(host, HostMemory) else FilesOfDevice(host, files)


class HostMemory(Place):
    """The memory that the CPU computes in; a thread of its own copies."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "graphopt-copies")

    def out(self, value: torch.Tensor, name: str) -> Leaving:
        kept = torch.empty_like(value)
        return Leaving(self.copied(kept, value), Kept(lambda: self._back(kept)))

    def _back(self, kept: torch.Tensor) -> Arriving:
        tensor = torch.empty_like(kept)
        return Arriving(tensor, self.copied(tensor, kept))

    def copied(self, target: torch.Tensor, source: torch.Tensor) -> Callable[[], object]:
        """Start to fill `target`; what is returned waits for it."""
        return self._thread.submit(_copy, [_bytes(target), _bytes(source)]).result


class PinnedMemory(Place):
    """Page-locked memory of the host, to and from which a GPU copies by itself; one stream for each direction."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._to_host = torch.cuda.Stream(device)
        self._from_host = torch.cuda.Stream(device)

    def now(self) -> torch.cuda.Event:
        """The moment at which the device will have done all that it was given so far."""
        return _moment(torch.cuda.current_stream(self.device))

    def hold_until(self, moment: torch.cuda.Event) -> None:
        """Have the device go on only then; this process goes on at once."""
        torch.cuda.current_stream(self.device).wait_event(moment)

    def copied_out(self, value: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event]:
        """The copy, and the moment at which it is complete."""
        kept = torch.empty_like(value, device="cpu", pin_memory=True)
        return kept, _copied(self._to_host, self.now(), kept, value)

    def copied_in(self, allocated: torch.cuda.Event, target: torch.Tensor, kept: torch.Tensor) -> torch.cuda.Event:
        """Fill `target`, which is free to be written from that moment on; returns the moment at which it is filled."""
        return _copied(self._from_host, allocated, target, kept)

    def out(self, value: torch.Tensor, name: str) -> Leaving:
        kept, left = self.copied_out(value)
        return Leaving(lambda: self.hold_until(left), Kept(lambda: self._back(kept)))

    def _back(self, kept: torch.Tensor) -> Arriving:
        tensor = torch.empty_like(kept, device=self.device)
        arrived = self.copied_in(self.now(), tensor, kept)
        return Arriving(tensor, lambda: self.hold_until(arrived))


def _copied(
    stream: torch.cuda.Stream, after: torch.cuda.Event, target: torch.Tensor, source: torch.Tensor
) -> torch.cuda.Event:
    stream.wait_event(after)
    with torch.cuda.stream(stream):
        target.copy_(source, non_blocking=True)
    return _moment(stream)


def _moment(stream: torch.cuda.Stream) -> torch.cuda.Event:
    event = torch.cuda.Event()
    event.record(stream)
    return event


class Files(Place):
    """Files of this process, removed when it ends. One whose tensor is gone is for the next of its size."""

    def __init__(self, folder: "tempfile.TemporaryDirectory[str]") -> None:
        self._folder = folder
        self._files = TensorFiles(self._folder.name)
        self._free: defaultdict[int, list[str]] = defaultdict(list)
        self._numbers = itertools.count()
        log.info("tensors that do not stay in memory are in files of %s", self._folder.name)

    def out(self, value: torch.Tensor, name: str) -> Leaving:
        data = _bytes(value)
        free = self._free[data.numel()]
        file = free.pop() if free else f"value-{next(self._numbers)}"
        shape, strides, dtype = value.shape, value.stride(), value.dtype
        kept = Kept(lambda: self._back(file, torch.empty_strided(shape, strides, dtype=dtype), name))
        weakref.finalize(kept, free.append, file)
        return Leaving(self._files.write(file, data, f"saving {name} for backward").wait, kept)

    def _back(self, file: str, tensor: torch.Tensor, name: str) -> Arriving:
        return Arriving(tensor, self._files.read(file, _bytes(tensor), f"getting {name} back for backward").wait)


class FilesOfDevice(Place):
    """Files for tensors of a GPU, by way of pinned memory."""

    def __init__(self, host: PinnedMemory, files: Files) -> None:
        self._host = host
        self._files = files
        self._threads = ThreadPoolExecutor(4, "graphopt-copies")

    def out(self, value: torch.Tensor, name: str) -> Leaving:
        pinned, left = self._host.copied_out(value)

        def written() -> Kept:
            left.synchronize()
            return self._files.out(pinned, name).wait()

        in_file = self._threads.submit(written)
        return Leaving(in_file.result, Kept(lambda: self._back(in_file.result())))

    def _back(self, kept: Kept) -> Arriving:
        arriving = kept.back()
        tensor = torch.empty_like(arriving.tensor, device=self._host.device)
        allocated = self._host.now()

        def read() -> torch.cuda.Event:
            return self._host.copied_in(allocated, tensor, arriving.wait().pin_memory())

        arrived = self._threads.submit(read)
        return Arriving(tensor, lambda: self._host.hold_until(arrived.result()))


def _copy(target_and_source: list[torch.Tensor]) -> None:
    """Takes the two out of the list: the thread is not to hold on to them when it is done."""
    copy_bytes(target_and_source.pop(0), target_and_source.pop())


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor whose elements lie without gaps, in the order of memory; a view.

    Raises OffloadError for gaps: a kernel has laid its result out otherwise than was planned with.
    """
    if not is_dense(tensor):
        raise OffloadError(f"{tuple(tensor.shape)} elements at strides {tensor.stride()} cannot be copied as they lie")
    return bytes_of(tensor.as_strided((tensor.numel(),), (1,)))
