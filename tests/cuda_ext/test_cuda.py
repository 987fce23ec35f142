"""Sources in CUDA are built once and loaded without a GPU; what cannot be built is said once, and stood in for."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from graphopt.cuda_ext import cuda
from graphopt.cuda_ext.cuda import TARGETS, Kernels, LaunchError, kernels, nvcc
from graphopt.cuda_ext.native import CPP, BuildError, load

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
ANSWER = """
#include "number.cuh"
__global__ void kernel(int* to) { *to = number; }
extern "C" int answer() { return number; }
extern "C" int launched() { kernel<<<1, 1>>>(nullptr); return cudaGetLastError(); }
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "cache"
    monkeypatch.setenv("GRAPHOPT_CACHE", str(folder))
    cuda._by_nvcc.cache_clear()
    yield folder
    cuda._by_nvcc.cache_clear()


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands for nvcc: knows what its first line says, and fails as the rest does."""
    script = tmp_path / "nvcc"
    monkeypatch.setenv("NVCC", str(script))
    return script


def _fails(script: Path, knows: str, with_: str) -> None:
    script.write_text(
        f'#!/bin/sh\ncase "$*" in *--list-gpu-code*) echo {knows};; *) echo "{with_}" >&2; exit 1;; esac\n'
    )
    script.chmod(0o755)


def _need_nvcc() -> None:
    try:
        nvcc()
    except BuildError as error:
        pytest.skip(f"nothing was built by nvcc: {error}")


def test_a_source_is_built_for_all_targets_once_and_again_when_a_header_changes(cache: Path, tmp_path: Path) -> None:
    _need_nvcc()
    source, header = tmp_path / "answer.cu", tmp_path / "number.cuh"
    source.write_text(ANSWER)
    for number in (42, 42, 43):
        header.write_text(f"constexpr int number = {number};\n")
        library = load(source, nvcc())
        assert library.answer() == number
        assert (library.launched() == 0) == torch.cuda.is_available()
    assert len(list(cache.glob("*.so"))) == 2
    content = next(cache.glob("*.so")).read_bytes()
    assert all(f"sm_{target}".encode() in content for target in TARGETS)


@pytest.mark.parametrize("source", ["optimizers.cu", "byte_optimizers.cu"])
def test_without_nvcc_one_line_says_so(
    source: str, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("NVCC", "no-such-compiler")
    with caplog.at_level(logging.WARNING, "graphopt"):
        assert kernels(source, GPU) is None and kernels(source, GPU) is None
    (message,) = caplog.messages
    assert "\n" not in message and "no compiler 'no-such-compiler'" in message and "$NVCC" in message
    assert f"{source} cannot be used on GPUs, torch's operators are" in message


def test_what_the_compiler_says_is_said_once(cache: Path, compiler: Path, caplog: pytest.LogCaptureFixture) -> None:
    _fails(compiler, "sm_80", "expected a semicolon")
    with caplog.at_level(logging.WARNING, "graphopt"):
        assert kernels("optimizers.cu", GPU) is None and kernels("optimizers.cu", GPU) is None
    (message,) = caplog.messages
    assert "optimizers.cu:\nexpected a semicolon" in message


def test_what_the_driver_cannot_run_is_said_once(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source = tmp_path / "late.cpp"
    source.write_text(
        'extern "C" int hindrance() { return 35; }\n'
        'extern "C" const char* explained(long error) { return "the driver is too old"; }\n'
    )
    monkeypatch.setattr(cuda, "nvcc", lambda: CPP)
    with caplog.at_level(logging.WARNING, "graphopt"):
        assert kernels(str(source), GPU) is None and kernels(str(source), GPU) is None
    (message,) = caplog.messages
    assert "it was built, but cannot run: the driver is too old" in message


def test_targets_are_those_that_nvcc_knows(compiler: Path) -> None:
    _fails(compiler, "sm_75 sm_80 sm_90", "")
    codes = [flag for flag in nvcc().flags if flag.startswith("-gencode")]
    assert [code.rpartition("=")[2] for code in codes] == ["sm_80", "sm_90", "compute_90"]
    _fails(compiler, "sm_35", "")
    with pytest.raises(BuildError, match="builds for none of"):
        nvcc()


def test_nvcc_is_found_where_cuda_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NVCC", raising=False)
    script = tmp_path / "bin" / "nvcc"
    script.parent.mkdir()
    _fails(script, "sm_90", "")
    without = [each for each in os.environ["PATH"].split(os.pathsep) if not (Path(each) / "nvcc").exists()]
    monkeypatch.setenv("PATH", os.pathsep.join(without))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert nvcc().command == str(script)


def test_other_devices_have_torchs_operators() -> None:
    assert kernels("optimizers.cu", torch.device("meta")) is None


def test_an_error_of_a_launch_is_explained(cache: Path, tmp_path: Path) -> None:
    source = tmp_path / "failing.cpp"
    source.write_text(
        'extern "C" int launched(long, long, long threads) { return threads; }\n'
        'extern "C" const char* explained(long error) { return error ? "out of luck" : ""; }\n'
    )
    with pytest.raises(LaunchError, match="launched on cpu: out of luck"):
        Kernels(load(source)).call("launched", CPU, 0)
