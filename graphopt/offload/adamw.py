"""AdamW with its state on disk."""

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import ParamsT

from graphopt._torch import distributed_tensor, local_tensor, version_of
from graphopt.cuda_ext.adamw import Run, Settings, update
from graphopt.offload.everywhere import raise_everywhere
from graphopt.offload.shard import MASTER, Shard, rows_of
from graphopt.optim import AdamW
from graphopt.optim.adamw import settings_of
from graphopt.runtime.files import Part, StreamedState, TensorFiles, file_backed, working_folder


class DiskAdamW(AdamW):
    """`graphopt.optim.AdamW` whose moments and masters are in files: same arguments, results (bitwise) and state dict.

    A step streams them by in chunks, the next being read while one is updated and the last is written, so the state
    takes memory for three chunks only. Parameters and gradients stay in memory, that of the CPU. Each rank has files of
    its own, removed by `close` and at the end of the process: what outlives it is the state dict. If a file of one rank
    fails, `step` raises OffloadError on every rank of the parameters' meshes; the parameters are then between two
    steps, and the last checkpoint is what to go on from.
    """

    def __init__(
        self,
        params: ParamsT,
        folder: str | os.PathLike[str],
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        chunk_size: int = 64 << 20,
        checked: bool = False,
    ) -> None:
        """folder: where the files go, best on a disk of this machine; chunk_size: bytes.

        checked: keep checksums beside what is written, and compare when reading. Raises OffloadError if the folder
        cannot be written, and what `AdamW` raises.
        """
        super().__init__(params, lr, betas, eps, weight_decay)
        self._folder = working_folder(Path(folder))
        self._files = TensorFiles(self._folder.name, checked=checked)
        self._chunk_size = chunk_size
        self._streams: dict[torch.dtype, StreamedState] = {}
        self._names: dict[torch.Tensor, str] = {}

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None, *, gradient_scale: float = 1.0
    ) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        error = None
        try:
            self._update(gradient_scale)
        except Exception as caught:
            error = caught
        raise_everywhere(error, {p.device_mesh: None for p in self._parameters() if isinstance(p, DTensor)})
        return loss

    def state_dict(self) -> dict[str, Any]:
        """As of `AdamW`. The tensors lie in unnamed files of the folder, mapped into memory as they are read.

        Raises OffloadError if the disk has no room for them.
        """
        found = super().state_dict()
        copies: dict[str, torch.Tensor] = {}
        for index, parameter in self._numbered(found):
            if index in found["state"]:
                shape = (len(rows_of(parameter.dtype)), local_tensor(parameter).numel())
                copies[self._names[parameter]] = copy = file_backed(self._folder.name, shape, torch.float32)
                found["state"][index] = {**found["state"][index], **_as_state(parameter, copy)}
        self._stream(partial(_copy_out, copies), copies, "state_dict", write=False)
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As of `AdamW`; the tensors may be mapped from files, and are read one after the other."""
        given: dict[str, list[torch.Tensor]] = {}
        for index, parameter in self._numbered(state_dict):
            if index in state_dict["state"]:
                name = self._names[parameter]
                given[name] = _as_rows(name, parameter, state_dict["state"][index])
        steps = {index: {"step": state["step"]} for index, state in state_dict["state"].items()}
        super().load_state_dict({**state_dict, "state": steps})
        self._stream(partial(_copy_in, given), given, "load_state_dict", write=True)

    def close(self) -> None:
        """Remove the files, and the state with them. Raises what went wrong with them, if nobody has been told."""
        self.__exit__(None, None, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._files.__exit__(kind, error, traceback)
        finally:
            self._folder.cleanup()

    def _update(self, gradient_scale: float) -> None:
        self._enroll()
        shards: dict[str, Shard] = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    name = self._names[parameter]
                    shards[name] = self._shard(name, parameter, group, gradient_scale)
        moment = f"step {max((shard.settings.step for shard in shards.values()), default=0)}"
        self._stream(partial(_change, shards), shards, moment, write=True)
        for shard in shards.values():
            shard.finish()
            self.state[shard.parameter]["step"] = torch.tensor(float(shard.settings.step))
        self._note_change([shard.parameter for shard in shards.values()])

    def _shard(self, name: str, parameter: torch.Tensor, group: Mapping[str, Any], gradient_scale: float) -> Shard:
        state = self.state[parameter]
        step = int(state["step"]) + 1 if state else 1
        settings = settings_of(group, step, gradient_scale)
        version = version_of(local_tensor(parameter))
        changed = self._versions.get(parameter, version) != version
        return Shard.of(name, parameter, settings, is_new=not state, renews_master=not state or changed)

    def _stream(
        self, see: Callable[[Sequence[Part]], None], names: Mapping[str, Any], moment: str, *, write: bool
    ) -> None:
        for stream in self._streams.values():
            (stream.update if write else stream.visit)(see, names, moment)

    def _parameters(self) -> Iterator[torch.Tensor]:
        for group in self.param_groups:
            yield from group["params"]

    def _numbered(self, state_dict: Mapping[str, Any]) -> list[tuple[Any, torch.Tensor]]:
        """The parameters with the numbers that a state dict has for them."""
        self._enroll()
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        return list(zip(numbers, self._parameters(), strict=False))  # torch compares the groups

    def _enroll(self) -> None:
        """Give parameters that are new here their place in the files."""
        sizes: dict[torch.dtype, dict[str, int]] = defaultdict(dict)
        for number, group in enumerate(self.param_groups):
            for position, parameter in enumerate(group["params"]):
                if parameter not in self._names:
                    names = group.get("param_names")
                    name = names[position] if names else f"parameter {position} of group {number}"
                    self._names[parameter] = name
                    sizes[parameter.dtype][name] = local_tensor(parameter).numel()
        for dtype, new in sizes.items():
            if dtype not in self._streams:
                label = str(dtype).removeprefix("torch.")
                self._streams[dtype] = StreamedState(self._files, label, len(rows_of(dtype)), self._chunk_size)
            self._streams[dtype].add(new)


def _change(shards: Mapping[str, Shard], parts: Sequence[Part]) -> None:
    runs: dict[Settings, list[Run]] = defaultdict(list)
    for part in parts:
        shard = shards[part.name]
        runs[shard.settings].append(shard.run(part))
    for settings, due in runs.items():
        update(due, settings)


def _copy_out(copies: Mapping[str, torch.Tensor], parts: Sequence[Part]) -> None:
    for part in parts:
        copies[part.name][:, part.start : part.stop] = part.rows


def _copy_in(given: Mapping[str, Sequence[torch.Tensor]], parts: Sequence[Part]) -> None:
    for part in parts:
        for row, values in zip(part.rows, given[part.name], strict=True):
            row.copy_(values[part.start : part.stop])


def _as_state(parameter: torch.Tensor, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """Rows of state as tensors of the parameter's shape and placement."""
    named = zip(rows_of(parameter.dtype), rows, strict=True)
    local = {key: row.view(local_tensor(parameter).shape) for key, row in named}
    if isinstance(parameter, DTensor):
        return {key: distributed_tensor(value, parameter) for key, value in local.items()}
    return local


def _as_rows(name: str, parameter: torch.Tensor, state: Mapping[str, Any]) -> list[torch.Tensor]:
    """The reverse; a master that is missing is what the parameter is."""
    rows = []
    for key in rows_of(parameter.dtype):
        value = state.get(key, parameter if key == MASTER else None)
        if value is None or local_tensor(value).shape != local_tensor(parameter).shape:
            shape = "missing" if value is None else f"{list(local_tensor(value).shape)} on this rank"
            raise ValueError(f"{key} of {name!r} is {shape}, the parameter {list(local_tensor(parameter).shape)}")
        rows.append(local_tensor(value).reshape(-1))
    return rows
