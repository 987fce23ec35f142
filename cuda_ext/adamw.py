"""The update of AdamW over runs of memory: one pass of native code on the CPU, torch's operators elsewhere.

Native code rounds as torch does. Where both have AVX2 or AVX-512, moments have the bits of ``torch.optim.AdamW``, and
parameters those of its fused kernel: without ``fused=True``, torch takes roots that are not rounded to nearest.
"""

import ctypes
import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from graphopt.cuda_ext.native import BuildError, load

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
        return 1 - self.lr * self.weight_decay

    @property
    def correction(self) -> float:
        """What the root of the second moment is divided by."""
        return float((1 - self.betas[1] ** self.step) ** 0.5)

    @property
    def step_size(self) -> float:
        return self.lr / (1 - self.betas[0] ** self.step)


def update(runs: Sequence[Run], settings: Settings) -> None:
    """One step of AdamW on every run. Any part of a larger tensor may be a run: elements do not see each other.

    On the CPU torch's number of threads share one pass over memory. What lies on another device, or with gaps, or is of
    a subclass, is updated by torch's operators. Raises ValueError that names the run and its tensor, before any is
    changed.
    """
    for index, run in enumerate(runs):
        _check(run, index)
    flat: list[Run] = []
    others: list[Run] = []
    for run in runs:
        if _is_flat(run):
            flat.append(run)
        else:
            gradient = torch.empty_like(run.parameter, dtype=run.gradient.dtype).copy_(run.gradient)
            run = run._replace(gradient=gradient)
            (flat if _is_flat(run) else others).append(run)
    library = _library() if flat else None
    if library is not None:
        update_flat(library, flat, settings)
    else:
        others += flat
    for run in others:
        _update_by_operators(run, settings)


def update_flat(library: ctypes.CDLL, runs: Sequence[Run], settings: Settings, level: int | None = None) -> None:
    """`update` of dense runs on the CPU by native code.

    level: 0 baseline, 1 AVX2, 2 AVX-512; by default, and at most, what the processor has.
    """
    table = [word for run in runs for word in _words(run)]
    widest = library.adamw_level()
    library.adamw(
        (ctypes.c_int64 * len(table))(*table),
        ctypes.c_int64(len(runs)),
        (ctypes.c_float * 8)(*_factors(settings)),
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
    """Whether every tensor is a stretch of the CPU's memory, with its elements in the same order as the others."""
    tensors = [tensor for tensor in run if tensor is not None]
    # What the bytes of a subclass are (a fake tensor has none) is known to its operators alone.
    if not run.parameter.is_cpu or not _PLAIN.issuperset(map(type, tensors)):
        return False
    if all(map(torch.Tensor.is_contiguous, tensors)):
        return True
    strides = run.parameter.stride()
    order = sorted(range(len(strides)), key=strides.__getitem__, reverse=True)
    return run.parameter.permute(order).is_contiguous() and all(tensor.stride() == strides for tensor in tensors)


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
    """The settings as adamw.cpp reads them; rounded to float32 where torch does it, after the arithmetic."""
    beta1, beta2 = at.betas
    return (at.gradient_scale, at.decay, 1 - beta1, beta2, 1 - beta2, at.correction, at.eps, -at.step_size)


@torch.no_grad()
def _update_by_operators(run: Run, at: Settings) -> None:
    beta1, beta2 = at.betas
    gradient = run.gradient.float() * at.gradient_scale
    run.parameter.mul_(at.decay)
    run.exp_avg.lerp_(gradient, 1 - beta1)
    run.exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    denominator = (run.exp_avg_sq.sqrt() / at.correction).add_(at.eps)
    run.parameter.addcdiv_(run.exp_avg, denominator, value=-at.step_size)
    if run.copy is not None:
        run.copy.copy_(run.parameter)
