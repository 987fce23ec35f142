"""The only file that touches names of triton that are not its public language (triton 3.6 to 3.9).

Two ways to use kernels where there is no GPU, each for the time of a context:

    interpreted()            launches run in triton's interpreter, on tensors of the CPU
    compiling(capability)    launches compile for a GPU that is not there, and do not run; tensors may be on "meta"
"""

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, interpreter
from triton.runtime.jit import JITFunction

_WARP = 32  # threads


def version() -> str:
    return str(triton.__version__)


def is_interpreting() -> bool:
    """Whether launches run in the interpreter: inside of `interpreted`, or as ``TRITON_INTERPRET`` says."""
    return bool(knobs.runtime.interpret)


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Run launches in the interpreter. Raises IndexError where a kernel reads or writes outside of its tensors.

    Triton decides when it is imported whether it interprets; this decides by context. Repairs the rounding of bfloat16,
    which the interpreter cuts off. (It also computes on the raw bits of bfloat16: kernels must cast as they load.)
    """
    functions: dict[Any, Any] = {}

    def function(kernel: Any) -> Any:
        if kernel.fn not in functions:
            functions[kernel.fn] = interpreter.InterpretedFunction(kernel.fn)
        return functions[kernel.fn]

    def run(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        tensors = [value for value in (*arguments, *options.values()) if isinstance(value, torch.Tensor)]
        with _exchanged((interpreter, "_interpreter", _Bounded(interpreter._interpreter, tensors))):
            return function(kernel).run(*arguments, grid=grid, warmup=warmup, **options)

    def call(kernel: Any, *arguments: Any, **options: Any) -> Any:
        return function(kernel).rewrite()(*arguments, **options)

    def index(tensor: Any) -> int:  # that of triton 3.6 fails on numpy 2.4
        return int(tensor.handle.data.squeeze())

    with (
        _interpreted_language(),
        knobs.runtime.scope(),  # what is set below is as before behind it
        _exchanged(
            (JITFunction, "run", run),
            (JITFunction, "__call__", call),
            (tl.tensor, "__index__", index),
            (interpreter, "_convert_float", _converting(interpreter._convert_float)),
        ),
    ):
        knobs.runtime.interpret = True
        yield


@contextlib.contextmanager
def _interpreted_language() -> Iterator[None]:
    """The language's own functions interpreted: once, where the interpreter would do it anew at each of their calls."""

    class Done:
        def restore(self) -> None:
            pass

    changes = interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    try:
        with _exchanged((interpreter, "_patch_lang", lambda function: Done())):
            yield
    finally:
        changes.restore()


class _Bounded:
    """Stands for the part of the interpreter that touches memory, and lets kernels touch some tensors alone."""

    def __init__(self, memory: Any, tensors: list[torch.Tensor]) -> None:
        self._memory = memory
        spans = [_span(tensor) for tensor in tensors if tensor.numel()]
        self._first = np.array([first for first, _ in spans], dtype=np.uint64)
        self._end = np.array([end for _, end in spans], dtype=np.uint64)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._memory, name)

    def load(self, pointers: Any, mask: Any, other: Any, dtype: Any) -> Any:
        self._check("reads", pointers, mask, np.dtype(dtype).itemsize)
        return self._memory.load(pointers, mask, other, dtype)

    def store(self, pointers: Any, values: Any, mask: Any) -> Any:
        self._check("writes", pointers, mask, values.dtype.itemsize)
        return self._memory.store(pointers, values, mask)

    def _check(self, does: str, pointers: Any, mask: Any, size: int) -> None:
        used = pointers.reshape(-1)
        if mask is not None:
            used = used[np.broadcast_to(mask, pointers.shape).reshape(-1).astype(bool)]
        inside = (used[:, None] >= self._first) & (used[:, None] + np.uint64(size) <= self._end)
        outside = int((~inside.any(1)).sum())
        if outside:
            raise IndexError(f"the kernel {does} {outside} of {len(used)} elements outside of its tensors")


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """Addresses of the first byte, and of the one behind the last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _converting(others: Callable[..., Any]) -> Callable[..., Any]:
    """What converts numbers of the interpreter, whose bfloat16 are bits: by torch where it is from float32 or to it."""

    def convert(values: Any, source: Any, target: Any, rounding: Any) -> Any:
        if (source, target) == (tl.float32, tl.bfloat16):
            floats = torch.from_numpy(np.array(values, dtype=np.float32))
            return floats.bfloat16().view(torch.uint16).numpy()
        return others(values, source, target, rounding)

    return convert


class Compiled(NamedTuple):
    """A kernel as the assembler left it.

    registers, stack: of a thread, the latter in bytes, which it has where it spills. shared, threads: of a program, the
    former bytes of shared memory. load: bytes that a thread reads at once, at most.
    """

    kernel: str
    registers: int
    stack: int
    shared: int
    threads: int
    load: int


@contextlib.contextmanager
def compiling(capability: int) -> Iterator[list[Compiled]]:
    """Compile launches for GPUs of a compute capability (90 for 9.0), as a launch there would; gives what came of it.

    What triton knows of an argument (its dtype, whether it is 1 or a multiple of 16) is taken from the launch.
    """
    compiled: list[Compiled] = []
    launch = JITFunction.run

    def run(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        made = launch(kernel, *arguments, grid=grid, warmup=True, **options)
        compiled.append(_resources(kernel.__name__, made))
        return made

    with _exchanged((driver, "_active", _Absent(capability)), (JITFunction, "run", run)):
        yield compiled


class _Absent:
    """A driver of a GPU that is not there."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, _WARP)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return -int(self._target.arch)  # kernels are kept by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


def _resources(name: str, compiled: Any) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        told = subprocess.run(command, capture_output=True, text=True, check=True)
    match = re.search(r"REG:(\d+) STACK:(\d+)", told.stdout + told.stderr)
    assert match is not None, f"cuobjdump tells nothing of {name}"
    loads = re.findall(r"ld\.global(?:\.\w+)*?(?:\.v(\d))?\.[bfsu](\d+)", compiled.asm["ptx"])
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global [^;]*?, 0x([0-9a-f]+)", compiled.asm["ptx"])
    return Compiled(
        name,
        registers=int(match[1]),
        stack=int(match[2]),
        shared=int(compiled.metadata.shared),
        threads=compiled.metadata.num_warps * _WARP,
        load=max([int(count or 1) * int(bits) // 8 for count, bits in loads] + [int(size, 16) for size in copies]),
    )


@contextlib.contextmanager
def _exchanged(*attributes: tuple[Any, str, Any]) -> Iterator[None]:
    """Set attributes of objects for the time of the context."""
    with contextlib.ExitStack() as stack:
        for owner, name, value in attributes:
            had = name in vars(owner)
            before = getattr(owner, name, None)
            stack.callback(setattr, owner, name, before) if had else stack.callback(delattr, owner, name)
            setattr(owner, name, value)
        yield
