"""Lists of tensors as optimizers.cu and byte_optimizers.cu take them: tables of addresses, by device and type."""

import ctypes
import struct
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import NamedTuple, TypeVar

import torch

from graphopt.cuda_ext.byte_states import ByteState
from graphopt.cuda_ext.cuda import Kernels
from graphopt.cuda_ext.rules import Rule

TYPES = {
    (torch.float32, torch.float32): 0,
    (torch.float32, torch.bfloat16): 1,
    (torch.float32, torch.float16): 2,
    (torch.bfloat16, torch.bfloat16): 3,
    (torch.float16, torch.float16): 4,
}
"""Dtypes of parameters and gradients that kernels take, as `Types` of lists.cuh numbers them."""

_COMMON = struct.Struct("11f4xQQQq")
T = TypeVar("T")
Key = TypeVar("Key", bound=Hashable)


class Run(NamedTuple):
    """What is updated together: contiguous tensors of one shape on one device, which share no memory.

    parameter: float32, bfloat16 or float16, updated; gradient: of the parameter's dtype, or of any of these where that
    is float32, only read; states: float32 or all `ByteState`, updated; copy: bfloat16 or float16 beside a float32
    parameter, set to the new one, rounded to nearest even.
    """

    parameter: torch.Tensor
    gradient: torch.Tensor
    states: tuple[torch.Tensor | ByteState, ...]
    copy: torch.Tensor | None = None

    @property
    def has_bytes(self) -> bool:
        return bool(self.states) and isinstance(self.states[0], ByteState)

    def changed(self) -> list[torch.Tensor]:
        """The tensors that an update writes."""
        states = [each for state in self.states for each in (state if isinstance(state, ByteState) else (state,))]
        return [self.parameter, *states, *(() if self.copy is None else (self.copy,))]


def update_lists(
    kernels: Kernels, runs: Sequence[Run], rule: Rule, scale: torch.Tensor | None, skip: torch.Tensor | None
) -> None:
    """One step on runs of one device, by the kernels of the source that is for their states."""
    device = runs[0].parameter.device
    numbers = (rule.gradient_scale, *rule.factors)
    factors = None
    if any(isinstance(each, torch.Tensor) for each in numbers):
        factors = torch.stack([torch.zeros((), device=device) + each for each in numbers]).float()
    given = [0.0 if isinstance(each, torch.Tensor) else each for each in numbers]
    addresses = [0 if each is None else each.data_ptr() for each in (factors, scale, skip)]
    for (types, copy), alike in grouped(runs, _kind).items():
        common = _bytes(_COMMON.pack(*given, *addresses, copy == torch.float16))
        table = _table(_words(run) for run in alike)
        if rule.number is None:
            between = torch.empty(kernels.count("floats_of_lamb", table, len(alike)), device=device)
            kernels.call("lamb", device, table, common, between, len(alike), types)
        else:
            kernels.call("optimize", device, table, common, len(alike), rule.number, types)


def norm_of_lists(
    kernels: Kernels, gradients: Sequence[torch.Tensor], most: float | None, gradient_scale: float
) -> torch.Tensor:
    """Three float32: see `Norm` of norm.cuh."""
    device = gradients[0].device
    parts = []
    for dtype, alike in grouped(gradients, lambda gradient: gradient.dtype).items():
        table = _table((0, gradient.data_ptr(), 0, 0, 0, 0, 0, gradient.numel()) for gradient in alike)
        sums = torch.empty(kernels.count("floats_of_squares", table, len(alike)), device=device)
        kernels.call("squares", device, table, sums, len(alike), TYPES[torch.float32, dtype])
        parts.append(sums)
    sums, result = torch.cat(parts), torch.empty(3, device=device)
    limit = -1.0 if most is None else float(most)
    kernels.call("norm_of_sums", device, sums, result, sums.numel(), float(gradient_scale), limit)
    return result


def _kind(run: Run) -> tuple[int, torch.dtype | None]:
    types = TYPES[run.parameter.dtype, run.gradient.dtype]
    return types, None if run.copy is None else run.copy.dtype


def _words(run: Run) -> tuple[int, ...]:
    """The run as lists.cuh reads it."""
    firsts, scales = [0, 0], [0, 0]
    for number, state in enumerate(run.states):
        values, scale = state if isinstance(state, ByteState) else (state, None)
        firsts[number] = values.data_ptr()
        scales[number] = 0 if scale is None else scale.data_ptr()
    copy = 0 if run.copy is None else run.copy.data_ptr()
    return (run.parameter.data_ptr(), run.gradient.data_ptr(), *firsts, copy, *scales, run.parameter.numel())


def _table(rows: Iterable[tuple[int, ...]]) -> ctypes.Array[ctypes.c_int64]:
    words = [word for row in rows for word in row]
    return (ctypes.c_int64 * len(words))(*words)


def _bytes(packed: bytes) -> ctypes.Array[ctypes.c_char]:
    return ctypes.create_string_buffer(packed, len(packed))


def grouped(items: Iterable[T], key: Callable[[T], Key]) -> dict[Key, list[T]]:
    """The items by their key, in order."""
    groups: dict[Key, list[T]] = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return groups
