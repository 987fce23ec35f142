"""Which way an operator of this room is computed, and why: from its tensors, and from what is asked for.

What is asked for is one of

    auto         what the family's kernels take, Triton first (the default)
    triton       Triton, on a GPU or in its interpreter
    cuda         native code of `graphopt.cuda_ext`, which is for the CPU as yet
    reference    operators of torch
    off          as reference, and no pass puts these operators into a program

Of a compiled program it is decided when it is compiled: GRAPHOPT_KERNELS if that is set, else the plan's `kernels`.
Elsewhere GRAPHOPT_KERNELS decides at each call. What is asked for and cannot be had is an error.
"""

import contextlib
import functools
import importlib
import importlib.util
import math
import os
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch

from graphopt.errors import GraphoptError
from graphopt.nearest import nearest

VARIABLE = "GRAPHOPT_KERNELS"
MODES = ("auto", "triton", "cuda", "reference", "off")
_FILES = {"triton": "kernel", "cuda": "native", "reference": "reference"}
OF_TRITON = frozenset({torch.float16, torch.bfloat16, torch.float32})  # what kernels take, where they say no other
OF_CPU = frozenset({torch.bfloat16, torch.float32})  # what native code takes, where there is some
_LEAST_CAPABILITY = (8, 0)  # of bfloat16 and of what the kernels are compiled for
_WIDEST_ACCESS = 16  # bytes that a thread of a GPU reads at once
_decided: ContextVar[str | None] = ContextVar("kernels", default=None)


class KernelError(GraphoptError, ValueError):
    """A kernel that was asked for and cannot run; the message says why, and what would."""


class Choice(NamedTuple):
    """variant: triton, cuda or reference. why: for people."""

    variant: str
    why: str


@dataclass(frozen=True)
class Family:
    """The operators of one folder: each is computed by the function of its name in the file of a variant.

    widest: of rows that the Triton kernels take; triton: dtypes that they take; capability: the least that they run on.
    native: dtypes that native code takes on the CPU. of_models: whether models call the operators themselves, so that
    "off", which keeps passes from putting them in, says nothing of how they are computed.
    """

    folder: str
    widest: int
    native: frozenset[torch.dtype] = frozenset()
    triton: frozenset[torch.dtype] = OF_TRITON
    capability: tuple[int, int] = _LEAST_CAPABILITY
    of_models: bool = False

    def choose(self, x: torch.Tensor) -> Choice:
        """How operators are computed for tensors like `x`, [..., width]. Raises KernelError where not as asked."""
        mode = mode_of_kernels()
        if mode == "off" and self.of_models:
            mode = "auto"
        if mode in ("reference", "off"):
            return Choice("reference", f"kernels={mode}")
        hindrances = {"triton": self._hinders_triton(x, mode), "cuda": self._hinders_native(x)}
        possible = [variant for variant, hindrance in hindrances.items() if hindrance is None]
        if mode != "auto":
            if mode not in possible:
                other = possible[0] if possible else "reference"
                reason = f"{self.folder}: {hindrances[mode]}"
                raise KernelError(f"kernels={mode}, but {reason}; {other} takes it, or auto")
            return Choice(mode, f"kernels={mode}")
        if possible:
            return Choice(possible[0], _described(x))
        return Choice("reference", "; ".join(f"{name}: {reason}" for name, reason in hindrances.items()))

    def run(self, operator: str, x: torch.Tensor, *arguments: Any) -> Any:
        """The results of an operator, by the variant that is chosen for its first argument."""
        return getattr(_module(self.folder, _FILES[self.choose(x).variant]), operator)(x, *arguments)

    def widest_of(self, dtype: torch.dtype) -> int:
        """The widest rows of a dtype that the Triton kernels take."""
        return self.widest

    def _hinders_triton(self, x: torch.Tensor, mode: str) -> str | None:
        """Why Triton does not take `x`; None if it does."""
        if x.dtype not in self.triton:
            return f"Triton kernels take no {x.dtype}"
        if x.dim() and x.shape[-1] > self.widest_of(x.dtype):
            return f"Triton kernels take rows of up to {self.widest_of(x.dtype)}, not {x.shape[-1]}"
        if not x.is_cuda and mode == "auto":
            return f"on {x.device}"
        if not _has_triton():
            return "triton is not installed"
        if x.is_cuda:
            capability = torch.cuda.get_device_capability(x.device)
            return (
                None if capability >= self.capability else f"compute capability {capability} is below {self.capability}"
            )
        return None if _is_interpreting() else f"on {x.device}, without Triton's interpreter"

    def _hinders_native(self, x: torch.Tensor) -> str | None:
        """Why native code does not take `x`; None if it does."""
        if not self.native:
            return "there is no native code"
        if not x.is_cpu:
            return f"native code is for the CPU, not for {x.device}"
        return None if x.dtype in self.native else f"native code takes no {x.dtype}"


def asked(planned: str = "auto") -> str:
    """What the environment asks for, else what is planned. Raises KernelError if there is none such."""
    mode = os.environ.get(VARIABLE, planned)
    if mode not in MODES:
        raise KernelError(f"{VARIABLE} is {mode!r}: {nearest(mode, MODES)}")
    return mode


def mode_of_kernels() -> str:
    """What is asked for here: as was decided for the program that is made or runs, else as the environment says."""
    return _decided.get() or asked()


@contextlib.contextmanager
def decided(mode: str | None) -> Iterator[None]:
    """Operators are computed as `mode` says, whatever the environment does; None leaves that to the environment."""
    before = _decided.set(mode)
    try:
        yield
    finally:
        _decided.reset(before)


def _described(x: torch.Tensor) -> str:
    """What of a tensor decides, and on a GPU how much of a row is read at once: of rows that start anywhere, less."""
    width = x.shape[-1] if x.dim() else 1
    told = f"{x.dtype} on {x.device}, rows of {width}"
    if not x.is_cuda:
        return told
    capability = ".".join(map(str, torch.cuda.get_device_capability(x.device)))
    told = f"{told}, compute capability {capability}"
    access = math.gcd(width * x.dtype.itemsize, _WIDEST_ACCESS) if isinstance(width, int) else _WIDEST_ACCESS
    return told if access == _WIDEST_ACCESS else f"{told}, {access} bytes at a time: rows are no multiples of 16"


@functools.cache
def _module(folder: str, file: str) -> ModuleType:
    """Imported when it is first used: Triton is optional."""
    return importlib.import_module(f"graphopt.triton_kernels.{folder}.{file}")


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _is_interpreting() -> bool:
    from graphopt.triton_kernels import _triton

    return _triton.is_interpreting()
