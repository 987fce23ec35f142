"""Kernels for the CPU: libraries of plain C functions, each built for the widest instruction set of the processor."""

import ctypes
import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from graphopt.cuda_ext.instructions import FLAGS, available
from graphopt.cuda_ext.native import CPP, BuildError, load

log = logging.getLogger("graphopt")

_AS_THEY_ARE = frozenset({int, bool, float, type(None)})  # looking a type up is the fastest way to tell
Argument = torch.Tensor | ctypes.Array[Any] | float | int | None


@dataclass(frozen=True)
class Library:
    """Functions whose integers have 64 bits, whose other numbers are floats, and whose last argument counts threads."""

    handle: ctypes.CDLL

    def call(self, name: str, *arguments: Argument) -> None:
        """Calls a function; tensors are passed as the address of their first element, None as null."""
        function = getattr(self.handle, name)
        if function.argtypes is None:  # declared once: it is half the time of a call otherwise
            function.argtypes = [*map(type_of, arguments), ctypes.c_int64]
        function(*addressed(arguments), torch.get_num_threads())


@functools.cache
def library(source: str, instructions: str | None = None) -> Library | None:
    """What `source`, a file beside this one, is built to; None where it cannot be, which one line of the log says.

    A source in CUDA becomes loops over blocks and threads. instructions: one of `FLAGS`; by default the widest that the
    processor has.
    """
    flags = FLAGS[instructions or available()[-1]]
    language = ("-x", "c++") if source.endswith(".cu") else ()
    # What a kernel computes is bounded, not given bit by bit: multiply-adds may be fused wherever it is faster.
    compiler = replace(CPP, flags=(*CPP.flags, "-ffp-contract=fast", *flags, *language))
    try:
        return Library(load(Path(__file__).with_name(source), compiler))
    except BuildError as error:
        log.warning("%s cannot be used, torch's operators are, which takes longer: %s", source, error)
        return None


def type_of(argument: Argument) -> type:
    """The argument as C takes it."""
    if isinstance(argument, float):
        return ctypes.c_float
    return ctypes.c_int64 if isinstance(argument, int) else ctypes.c_void_p


def addressed(arguments: Sequence[Argument]) -> list[Argument]:
    """As ctypes passes them: the address of its first element for each tensor."""
    return [each if type(each) in _AS_THEY_ARE else _address(each) for each in arguments]


def _address(argument: Argument) -> Argument:
    return argument.data_ptr() if isinstance(argument, torch.Tensor) else argument
