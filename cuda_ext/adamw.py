"""The update of AdamW over runs of memory: one pass of native code on the CPU, torch's operators elsewhere.

Native code rounds as torch does. Where both have AVX2 or AVX-512, moments have the bits of ``torch.optim.AdamW``, and
parameters those of its fused kernel: without ``fused=True``, torch takes roots that are not rounded to nearest.
"""

import ctypes
import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from graphopt.cuda_ext import optimizers
from graphopt.cuda_ext.native import BuildError, load
from graphopt.cuda_ext.rules import Adam

log = logging.getLogger("graphopt")
_FLOAT32 = (torch.float32,)
_DTYPES = {
    "parameter": _FLOAT32,
    "gradient": (torch.float32, torch.bfloat16),
    "exp_avg": _FLOAT32,
    "exp_avg_sq": _FLOAT32,
    "copy": (torch.bfloat16,),
}
_PLAIN = {torch.Tensor, torch.nn.Parameter}


class Run(NamedTuple):
    """What is updated together: tensors of one shape on one device, which share no memory.

    parameter, exp_avg, exp_avg_sq: float32, updated; gradient: float32 or bfloat16, only read;
    copy: bfloat16, set to the new parameter, rounded to nearest even.
    """

    parameter: torch.Tensor
    gradient: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    copy: torch.Tensor | None = None

    def as_list_has_it(self) -> optimizers.Run:
        return optimizers.Run(self.parameter, self.gradient, (self.exp_avg, self.exp_avg_sq), self.copy)


@dataclass(frozen=True)
class Settings:
    """AdamW's hyperparameters at one step.

    step: 1 at the first update; gradient_scale: what gradients are multiplied by before anything else.
    """

    step: int
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2
    gradient_scale: float = 1.0

    @property
    def decay(self) -> float:
        return self.rule.kept

    @property
    def rule(self) -> Adam:
        return Adam(self.lr, self.step, self.betas, self.eps, self.weight_decay, True, self.gradient_scale)


def update(
    runs: Sequence[Run], settings: Settings, *, scale: torch.Tensor | None = None, skip: torch.Tensor | None = None
) -> None:
    """One step of AdamW on every run. Any part of a larger tensor may be a run: elements do not see each other.

    On the CPU torch's number of threads share one pass over memory, on a GPU one launch has many runs. What lies with
    gaps, or is of a subclass, is updated by torch's operators. scale, skip: as of
    `graphopt.cuda_ext.optimizers.update`; nobody waits for a GPU to know them.

    Raises ValueError that names the run and its tensor, before any is changed.
    """
    for index, run in enumerate(runs):
        _check(run, index)
    flat: list[Run] = []
    others: list[Run] = []
    for run in runs:
        if not _is_flat(run):
            gradient = torch.empty_like(run.parameter, dtype=run.gradient.dtype).copy_(run.gradient)
            run = run._replace(gradient=gradient)
        (flat if _is_flat(run) else others).append(run)
    optimizers.update([_in_order(run) for run in flat if run.parameter.is_cuda], settings.rule, scale=scale, skip=skip)
    on_cpu = [run for run in flat if run.parameter.is_cpu]
    library = _library() if on_cpu else None
    if library is None:
        others += on_cpu
    elif skip is None or not skip:
        factor = 1.0 if scale is None else float(scale)
        update_flat(library, on_cpu, replace(settings, gradient_scale=settings.gradient_scale * factor))
    for run in others:
        optimizers.by_operators(run.as_list_has_it(), settings.rule, scale, skip)


def update_flat(library: ctypes.CDLL, runs: Sequence[Run], settings: Settings, level: int | None = None) -> None:
    """`update` of dense runs on the CPU by native code.

    level: 0 baseline, 1 AVX2, 2 AVX-512; by default, and at most, what the processor has.
    """
    table = [word for run in runs for word in _words(run)]
    widest = library.adamw_level()
    library.adamw(
        (ctypes.c_int64 * len(table))(*table),
        ctypes.c_int64(len(runs)),
        (ctypes.c_float * 11)(*_factors(settings)),
        widest if level is None else min(level, widest),
        torch.get_num_threads(),
    )
    # What watches tensors for changes (autograd, gathered copies of parameters) cannot see this one.
    torch.autograd.graph.increment_version(
        [
            tensor
            for run in runs
            for tensor in (run.parameter, run.exp_avg, run.exp_avg_sq, run.copy)
            if tensor is not None
        ]
    )


@functools.cache
def _library() -> ctypes.CDLL | None:
    try:
        return load(Path(__file__).with_name("adamw.cpp"))
    except BuildError as error:
        log.warning("AdamW on the CPU goes through torch's operators, which takes longer: %s", error)
        return None


def _check(run: Run, index: int) -> None:
    shape, device = run.parameter.shape, run.parameter.device
    for (name, allowed), tensor in zip(_DTYPES.items(), run, strict=True):
        if tensor is None:
            continue
        if tensor.dtype not in allowed:
            raise ValueError(f"run {index}: {name} is {tensor.dtype}, not {' or '.join(map(str, allowed))}")
        if tensor.shape != shape or tensor.device != device:
            raise ValueError(
                f"run {index}: {name} is {list(tensor.shape)} on {tensor.device}, parameter {list(shape)} on {device}"
            )


def _is_flat(run: Run) -> bool:
    """Whether every tensor is a stretch of memory, with its elements in the same order as the others."""
    tensors = [tensor for tensor in run if tensor is not None]
    # What the bytes of a subclass are (a fake tensor has none) is known to its operators alone.
    if run.parameter.device.type not in ("cpu", "cuda") or not _PLAIN.issuperset(map(type, tensors)):
        return False
    if all(map(torch.Tensor.is_contiguous, tensors)):
        return True
    strides = run.parameter.stride()
    return run.parameter.permute(_order(run)).is_contiguous() and all(tensor.stride() == strides for tensor in tensors)


def _order(run: Run) -> list[int]:
    """The dimensions of the parameter, of the widest steps first."""
    strides = run.parameter.stride()
    return sorted(range(len(strides)), key=strides.__getitem__, reverse=True)


def _in_order(run: Run) -> optimizers.Run:
    """A flat run as contiguous tensors, which are views."""
    order = _order(run)
    copy = None if run.copy is None else run.copy.permute(order)
    parameter, gradient, *moments = (tensor.permute(order) for tensor in run[:4] if tensor is not None)
    return optimizers.Run(parameter, gradient, tuple(moments), copy)


def _words(run: Run) -> tuple[int, ...]:
    """The run as adamw.cpp reads it."""
    return (
        run.parameter.data_ptr(),
        run.gradient.data_ptr(),
        run.exp_avg.data_ptr(),
        run.exp_avg_sq.data_ptr(),
        0 if run.copy is None else run.copy.data_ptr(),
        run.parameter.numel(),
        run.gradient.dtype == torch.bfloat16,
    )


def _factors(at: Settings) -> tuple[float, ...]:
    """The settings as rules.h reads them; rounded to float32 where torch does it, after the arithmetic."""
    return (at.gradient_scale, *map(float, at.rule.factors))
