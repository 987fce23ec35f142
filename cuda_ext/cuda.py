"""Kernels in CUDA: a source is built by nvcc for all targets at once, and by the C++ compiler to loops on the CPU.

Device code is in ``.cuh``, what launches it in ``.cu``, behind a plain C ABI and with CUDA's runtime linked in: a
library fits every torch, and loads where there is no GPU. Its functions return the number of an error, and take last a
device and a stream; on the CPU these are 0 and a number of threads.
"""

import ctypes
import functools
import logging
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

from graphopt.cuda_ext.library import Argument, addressed, library, type_of
from graphopt.cuda_ext.native import BuildError, Compiler, load
from graphopt.errors import GraphoptError

log = logging.getLogger("graphopt")

TARGETS = (80, 90, 100)
"""Compute capabilities that sources are built for: A100, H100 and H200, B200."""
FLAGS = (
    *("-std=c++17", "-O3", "-shared", "-Xcompiler", "-fPIC", "-cudart", "static", "--threads", "0"),
    "--fmad=false",  # where a multiply-add is fused is for the source to say
)


class LaunchError(GraphoptError):
    """A kernel that CUDA refused to launch; the message is CUDA's own."""


@dataclass(frozen=True)
class Kernels:
    """The functions of a library of kernels."""

    handle: ctypes.CDLL

    def call(self, name: str, device: torch.device, *arguments: Argument) -> None:
        """Launches on the device's current stream, or runs on the CPU; tensors are passed by address, None as null.

        Raises LaunchError.
        """
        function = getattr(self.handle, name)
        if function.argtypes is None:
            function.argtypes = [*map(type_of, arguments), ctypes.c_int64, ctypes.c_int64]
        native = addressed(arguments)
        if device.type == "cuda":
            with torch.cuda.device(device):
                error = function(*native, device.index, torch.cuda.current_stream(device).cuda_stream)
        else:
            error = function(*native, 0, torch.get_num_threads())
        if error:
            raise LaunchError(f"{name} on {device}: {self.explained(error)}")

    def explained(self, error: int) -> str:
        function = self.handle.explained
        function.argtypes, function.restype = [ctypes.c_int64], ctypes.c_char_p
        text: bytes = function(error)
        return text.decode()

    def count(self, name: str, *arguments: Argument) -> int:
        """What a function that launches nothing says."""
        function = getattr(self.handle, name)
        function.argtypes, function.restype = [*map(type_of, arguments)], ctypes.c_int64
        return int(function(*arguments))


def kernels(source: str, device: torch.device) -> Kernels | None:
    """What `source`, a file beside this one, is built to for the CPU or a GPU; None for other devices.

    None also where it cannot be built, which one line of the log says.
    """
    if device.type == "cuda":
        return _by_nvcc(source)
    found = library(source) if device.type == "cpu" else None
    return None if found is None else Kernels(found.handle)


def nvcc() -> Compiler:
    """``$NVCC``, else what is called nvcc, else that of ``$CUDA_HOME``; builds for those of `TARGETS` that it knows.

    Raises BuildError if there is none.
    """
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    command = shutil.which("nvcc") or shutil.which(str(Path(home) / "bin" / "nvcc")) or "nvcc"
    compiler = Compiler("NVCC", command, ())
    known = subprocess.run([*compiler.found(), "--list-gpu-code"], capture_output=True, text=True, check=False).stdout
    targets = [target for target in TARGETS if f"sm_{target}" in known.split()]
    if not targets:
        raise BuildError(f"{command} builds for none of {TARGETS}: it knows {known.split()}")
    codes = [f"-gencode=arch=compute_{target},code=sm_{target}" for target in targets]
    later = f"-gencode=arch=compute_{targets[-1]},code=compute_{targets[-1]}"  # translated by the driver
    return Compiler("NVCC", command, (*FLAGS, *codes, later))


@functools.cache
def _by_nvcc(source: str) -> Kernels | None:
    try:
        found = Kernels(load(Path(__file__).parent / source, nvcc()))
        error = found.handle.hindrance()
        if error:
            raise BuildError(f"it was built, but cannot run: {found.explained(error)}")
        return found
    except BuildError as error:
        log.warning("%s cannot be used on GPUs, torch's operators are, which takes longer: %s", source, error)
        return None
