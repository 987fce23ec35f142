"""The instruction sets that kernels are tested with."""

from collections.abc import Iterator

import pytest
import torch

from graphopt.cuda_ext import library
from graphopt.cuda_ext.instructions import FLAGS, available


@pytest.fixture(params=[pytest.param("baseline", marks=pytest.mark.long), "avx2", "avx512"])
def instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Kernels are those of one set, which this processor must have."""
    if request.param not in available():
        pytest.skip(f"this processor has no {request.param}")
    sets = tuple(FLAGS)
    monkeypatch.setattr(library, "available", lambda: sets[: sets.index(request.param) + 1])
    library.library.cache_clear()
    yield request.param
    library.library.cache_clear()


@pytest.fixture
def without_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    monkeypatch.setenv("GRAPHOPT_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setenv("CXX", "no-such-compiler")
    library.library.cache_clear()
    yield
    library.library.cache_clear()


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
