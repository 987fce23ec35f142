"""Which way an operator of this room is computed, and why: decided at each call, from its tensors and a variable.

GRAPHOPT_KERNELS is one of

    auto         by what the family's kernels take, Triton first (the default)
    triton       by Triton, on a GPU or in its interpreter
    cuda         by native code of `graphopt.cuda_ext`, which is for the CPU as yet
    reference    by operators of torch
    off          as reference, and no pass puts these operators into a program

What is asked for and cannot be had is an error.
"""

import functools
import importlib
import importlib.util
import os
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch

from graphopt.errors import GraphoptError
from graphopt.nearest import nearest

VARIABLE = "GRAPHOPT_KERNELS"
MODES = ("auto", "triton", "cuda", "reference", "off")
_FILES = {"triton": "kernel", "cuda": "native", "reference": "reference"}
_OF_TRITON = frozenset({torch.float16, torch.bfloat16, torch.float32})
OF_CPU = frozenset({torch.bfloat16, torch.float32})  # what native code takes, where there is some
_LEAST_CAPABILITY = (8, 0)  # of bfloat16 and of what the kernels are compiled for


class KernelError(GraphoptError, ValueError):
    """A kernel that was asked for and cannot run; the message says why, and what would."""


class Choice(NamedTuple):
    """variant: triton, cuda or reference. why: for people."""

    variant: str
    why: str


@dataclass(frozen=True)
class Family:
    """The operators of one folder: each is computed by the function of its name in the file of a variant.

    widest: of rows that the Triton kernels take. native: dtypes that native code takes on the CPU. triton: dtypes that
    Triton kernels take.
    """

    folder: str
    widest: int
    native: frozenset[torch.dtype] = frozenset()
    triton: frozenset[torch.dtype] = _OF_TRITON

    def choose(self, x: torch.Tensor) -> Choice:
        """How operators are computed for tensors like `x`, [..., width]. Raises KernelError where not as asked."""
        mode = mode_of_kernels()
        if mode in ("reference", "off"):
            return Choice("reference", f"{VARIABLE}={mode}")
        hindrances = {"triton": self._hinders_triton(x, mode), "cuda": self._hinders_native(x)}
        possible = [variant for variant, hindrance in hindrances.items() if hindrance is None]
        if mode != "auto":
            if mode not in possible:
                other = possible[0] if possible else "reference"
                reason = f"{self.folder}: {hindrances[mode]}"
                raise KernelError(f"{VARIABLE}={mode}, but {reason}; {other} takes it, or auto")
            return Choice(mode, f"{VARIABLE}={mode}")
        if possible:
            return Choice(possible[0], f"{x.dtype} on {x.device}, rows of {x.shape[-1]}")
        return Choice("reference", "; ".join(f"{name}: {reason}" for name, reason in hindrances.items()))

    def run(self, operator: str, x: torch.Tensor, *arguments: Any) -> Any:
        """The results of an operator, by the variant that is chosen for its first argument."""
        return getattr(_module(self.folder, _FILES[self.choose(x).variant]), operator)(x, *arguments)

    def _hinders_triton(self, x: torch.Tensor, mode: str) -> str | None:
        """Why Triton does not take `x`; None if it does."""
        if x.dtype not in self.triton:
            return f"Triton kernels take no {x.dtype}"
        if x.dim() and x.shape[-1] > self.widest:
            return f"Triton kernels take rows of up to {self.widest}, not {x.shape[-1]}"
        if not x.is_cuda and mode == "auto":
            return f"on {x.device}"
        if not _has_triton():
            return "triton is not installed"
        if x.is_cuda:
            capability = torch.cuda.get_device_capability(x.device)
            return None if capability >= _LEAST_CAPABILITY else f"compute capability {capability} is below (8, 0)"
        return None if _is_interpreting() else f"on {x.device}, without Triton's interpreter"

    def _hinders_native(self, x: torch.Tensor) -> str | None:
        """Why native code does not take `x`; None if it does."""
        if not self.native:
            return "there is no native code"
        if not x.is_cpu:
            return f"native code is for the CPU, not for {x.device}"
        return None if x.dtype in self.native else f"native code takes no {x.dtype}"


def mode_of_kernels() -> str:
    """What the environment asks for. Raises KernelError if there is none such."""
    mode = os.environ.get(VARIABLE, "auto")
    if mode not in MODES:
        raise KernelError(f"{VARIABLE} is {mode!r}: {nearest(mode, MODES)}")
    return mode


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
