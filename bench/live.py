"""What a step of training has in memory at its peak: its storages, and all that operators allocate."""

import gc
import json
import tempfile
import time
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile

from graphopt._torch import TorchDispatchMode

_PATIENCE_SECONDS = 0.002


class Live(TorchDispatchMode):
    """The most bytes in live storages after any operation that runs.

    known: what is there before. is_elsewhere: whether a tensor's bytes are counted by somebody else. waits: let
    operations wait a little: gloo's own thread may let go of a buffer somewhat later than the wait for it returns.
    """

    def __init__(
        self,
        known: Iterable[torch.Tensor],
        *,
        is_elsewhere: Callable[[torch.Tensor], bool] = lambda tensor: False,
        waits: bool = False,
    ) -> None:
        super().__init__()
        self.most = 0
        self._storages: dict[int, tuple[weakref.ref[Any], int]] = {}
        self._is_elsewhere = is_elsewhere
        self._waits = waits
        for tensor in known:
            self._see(tensor)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._waits:
            time.sleep(_PATIENCE_SECONDS)
        for value in args:  # constants of the program are first met here
            self._see(value)
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, (list, tuple)) else [result]:
            self._see(value)
        self._storages = {key: seen for key, seen in self._storages.items() if seen[0]() is not None}
        self.most = max(self.most, sum(size for _, size in self._storages.values()))
        return result

    def _see(self, value: Any) -> None:
        if isinstance(value, torch.Tensor) and not isinstance(value, DTensor) and value.untyped_storage().nbytes():
            storage = value.untyped_storage()
            if storage.data_ptr() in self._storages or not self._is_elsewhere(value):
                self._storages[storage.data_ptr()] = (weakref.ref(storage), storage.nbytes())


def state_of(model: nn.Module, batch: dict[str, Any]) -> list[torch.Tensor]:
    """What is there before a step: parameters, buffers, and the batch."""
    parameters = [(p.to_local() if isinstance(p, DTensor) else p).detach() for p in model.parameters()]
    return [*parameters, *model.buffers(), *(value for value in batch.values() if isinstance(value, torch.Tensor))]


def step(model: nn.Module, batch: dict[str, Any]) -> None:
    """One training step without an optimizer; what the model returns is alive until it ends."""
    output = model(**batch)
    loss = output if isinstance(output, torch.Tensor) else output.loss
    loss.backward()


def warmed_up(model: nn.Module, batch: dict[str, Any]) -> None:
    """Two steps, whose gradients are dropped."""
    for _ in range(2):
        step(model, batch)
        model.zero_grad()
    gc.collect()


def most_alive(model: nn.Module, batch: dict[str, Any], **options: Any) -> int:
    """The peak of a third step, in bytes of live storages. options: those of `Live`."""
    warmed_up(model, batch)
    with Live(state_of(model, batch), **options) as live:
        step(model, batch)
    model.zero_grad()
    return live.most


def most_allocated(model: nn.Module, batch: dict[str, Any]) -> int:
    """The same peak as the CPU's allocator sees it: with what operators allocate inside and let go before they return.

    On one rank: what other threads free is not seen.
    """
    warmed_up(model, batch)
    before = sum({id(s): s.nbytes() for s in (t.untyped_storage() for t in state_of(model, batch))}.values())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step(model, batch)
    model.zero_grad()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = sorted((e["ts"], e["args"]) for e in events if e.get("name") == "[memory]")
    (_, first) = changes[0]
    return before + max(args["Total Allocated"] for _, args in changes) - first["Total Allocated"] + first["Bytes"]
