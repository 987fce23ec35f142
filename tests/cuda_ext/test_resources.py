"""Every source in CUDA compiles for every target, none of its kernels spills, and it loads where there is no GPU."""

import ctypes
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from graphopt.cuda_ext.cuda import TARGETS, Kernels, nvcc
from graphopt.cuda_ext.native import BuildError
from graphopt.cuda_ext.resources import REGISTERS, TABLE, hash_of_sources, measured, sources, version

TOLD = json.loads(TABLE.read_text())
_BLOCK = 256  # threads
_LEAST_BLOCKS = 3  # of a multiprocessor, for enough reads to be under way


def _need_nvcc() -> None:
    try:
        nvcc()
    except BuildError as error:
        pytest.skip(f"sources in CUDA were not compiled: {error}")


def _check_fits(kernel: dict[str, Any]) -> None:
    assert kernel["stack"] == kernel["stores"] == kernel["loads"] == 0, f"spills: {kernel}"
    assert kernel["registers"] * _BLOCK * _LEAST_BLOCKS <= REGISTERS, f"takes too many registers: {kernel}"


def test_the_table_is_of_these_sources_and_each_kernel_fits() -> None:
    assert TOLD["sources"] == hash_of_sources(), "run python -m graphopt.cuda_ext.resources"
    assert {(row["source"], row["capability"]) for row in TOLD["kernels"]} == {
        (source.name, target) for source in sources() for target in TARGETS
    }
    for kernel in TOLD["kernels"]:
        _check_fits(kernel)


@pytest.mark.parametrize("source", sources(), ids=lambda source: source.name)
def test_sources_compile_as_the_table_says_and_load_without_a_gpu(source: Path, tmp_path: Path) -> None:
    _need_nvcc()
    found = measured(source, tmp_path / "kernels.so")
    assert found
    for kernel in found:
        _check_fits(kernel)
    if TOLD["nvcc"] == version():  # others use other registers
        assert found == [row for row in TOLD["kernels"] if row["source"] == source.name]
    library = Kernels(ctypes.CDLL(str(tmp_path / "kernels.so")))
    assert "invalid" in library.explained(1)
    error = library.handle.hindrance()
    assert (error == 0) == torch.cuda.is_available(), library.explained(error)


@pytest.mark.long
@pytest.mark.parametrize("source", sources(), ids=lambda source: source.name)
def test_lists_are_read_and_written_by_16_bytes(source: Path) -> None:
    _need_nvcc()
    command = [*nvcc().found(), "-std=c++17", "-O3", "--fmad=false", "-arch=compute_90", "-ptx", "-o", "-", str(source)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    little = "LambTrust|4Norm|Squares|LambStepI[t4]"  # a number of each block; four of 16 bits
    for kernel in text.split(".entry ")[1:]:
        name = kernel.partition("(")[0]
        assert "ld.global.cs.v4" in kernel or re.search("LambTrust|4Norm", name), name
        assert "st.global.cs.v4" in kernel or re.search(little, name), name
