"""Tensors come back from files bit for bit, in order, whatever their size; threads and memory are given back."""

import gc
import os
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphopt.errors import OffloadError
from graphopt.runtime.files import TensorFiles, page_aligned

PAGE = 4096
DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool, torch.complex64]
# Around the edges of pages and blocks.
SIZES = st.one_of(st.integers(0, 3), st.integers(0, 40_000), st.sampled_from([PAGE - 1, PAGE, PAGE + 1, 2 * PAGE]))


def _drawn(size: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2 if dtype == torch.bool else 256, [size], generator=generator).to(dtype)


@given(
    size=SIZES,
    dtype=st.sampled_from(DTYPES),
    block=st.sampled_from([1, 2, 5]),
    checked=st.booleans(),
    direct=st.booleans(),
    aligned=st.booleans(),
    skipped=st.sampled_from([0, 1]),
)
def test_what_is_read_is_what_was_written(
    tmp_path_factory,
    size: int,
    dtype: torch.dtype,
    block: int,
    checked: bool,
    direct: bool,
    aligned: bool,
    skipped: int,
) -> None:
    memory = page_aligned([size + skipped], dtype) if aligned else torch.empty(size + skipped, dtype=dtype)
    tensor = memory[skipped:].copy_(_drawn(size, dtype, size))
    folder = tmp_path_factory.mktemp("files")
    options = {"block_size": block * PAGE, "checked": checked, "direct": direct}
    with TensorFiles(folder, **options) as files:
        files.write("a", tensor).wait()
        assert torch.equal(files.read("a").wait(), tensor)
    with TensorFiles(folder, **options) as files:  # as a later process finds it
        out = torch.empty_like(memory)[skipped:]
        assert files.read("a", out).wait() is not tensor
        assert torch.equal(out, tensor)


@given(
    steps=st.lists(st.tuples(st.sampled_from("abc"), st.booleans(), st.integers(0, 20_000)), max_size=40),
    checked=st.booleans(),
    depth=st.integers(1, 5),
)
def test_transfers_of_one_tensor_keep_their_order(tmp_path_factory, steps, checked: bool, depth: int) -> None:
    last: dict[str, torch.Tensor] = {}
    expected = []
    folder = tmp_path_factory.mktemp("files")
    with TensorFiles(folder, block_size=PAGE, depth=depth, checked=checked) as files:
        for number, (name, is_write, size) in enumerate(steps):
            if is_write:
                last[name] = _drawn(size, torch.int64, number)
                files.write(name, last[name])
            elif name in last:
                expected.append((files.read(name), last[name]))
        for transfer, value in expected:
            assert torch.equal(transfer.wait(), value)
        for name, value in last.items():
            assert torch.equal(files.read(name).wait(), value)
    assert {path.name for path in folder.iterdir()} == {f"{name}.tensor" for name in last}


def test_many_small_tensors_and_a_large_one(tmp_path: Path) -> None:
    large = torch.randn(5 << 20)
    small = {f"layers.{i}/bias": torch.randn(i) for i in range(300)}
    with TensorFiles(tmp_path, checked=True) as files:
        writes = [files.write("large", large), *(files.write(name, value) for name, value in small.items())]
        for write in writes:
            write.wait()
        reads = [files.read("large"), *(files.read(name) for name in small)]
        for read, value in zip(reads, [large, *small.values()], strict=True):
            assert torch.equal(read.wait(), value)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(3.5),
        torch.zeros(3, 0, 2),
        torch.randn(6, 7).t(),
        torch.randn(9)[::2],
        torch.randn(4, dtype=torch.complex64).conj(),
        torch.randn(3, requires_grad=True),
        torch.randn(8).to(torch.float8_e4m3fn),
    ],
    ids=["scalar", "empty", "transposed", "strided", "conjugated", "leaf", "float8"],
)
def test_tensors_of_any_kind(tmp_path: Path, tensor: torch.Tensor) -> None:
    with TensorFiles(tmp_path) as files:
        files.write("a", tensor).wait()
        found = files.read("a").wait()
    assert found.shape == tensor.shape and found.dtype == tensor.dtype
    assert torch.equal(found.view(-1).view(torch.uint8), tensor.resolve_conj().contiguous().view(-1).view(torch.uint8))


def test_a_name_may_get_another_shape(tmp_path: Path) -> None:
    with TensorFiles(tmp_path, block_size=PAGE) as files:
        for size in (10_000, 3, 0, 50_000):
            files.write("a", torch.full([size], size)).wait()
            assert torch.equal(files.read("a").wait(), torch.full([size], size))


def test_aligned_memory_is_moved_without_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copies = []
    monkeypatch.setattr("graphopt.runtime.files.blocks.copy_bytes", lambda *_: copies.append(1))
    with TensorFiles(tmp_path, block_size=PAGE) as files:
        files.write("a", page_aligned([4 * PAGE], torch.uint8)).wait()
        files.read("a", page_aligned([4 * PAGE], torch.uint8)).wait()
        assert not copies
        files.write("a", page_aligned([4 * PAGE + 1], torch.uint8)[1:]).wait()
        assert len(copies) == 4


@pytest.mark.parametrize("how", ["closed", "dropped"])
def test_threads_end(tmp_path: Path, how: str) -> None:
    before = set(threading.enumerate())
    files = TensorFiles(tmp_path, depth=3)
    files.write("a", torch.ones(3)).wait()
    own = set(threading.enumerate()) - before
    assert len(own) == 3
    if how == "closed":
        files.close()
    del files
    gc.collect()
    for thread in own:
        thread.join(timeout=10)
        assert not thread.is_alive()


def test_open_files_are_closed(tmp_path: Path) -> None:
    with TensorFiles(tmp_path) as files:
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(20):
            files.write("a", torch.ones(3)).wait()
            files.read("a").wait()
            with pytest.raises(OffloadError):
                files.read("b", torch.ones(3)).wait()
        assert len(os.listdir("/proc/self/fd")) == before


def test_misuse_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nearest valid size is 8192"):
        TensorFiles(tmp_path, block_size=8000)
    with pytest.raises(ValueError, match="at least one request"):
        TensorFiles(tmp_path, depth=0)
    with TensorFiles(tmp_path) as files:
        files.write("weight", torch.ones(4))
        with pytest.raises(OffloadError, match="no tensor 'weigth'; the nearest is 'weight'"):
            files.read("weigth")
        with pytest.raises(ValueError, match=r"4 elements of torch\.float32, out has 4 of torch\.int32"):
            files.read("weight", torch.ones(4, dtype=torch.int32))
        with pytest.raises(ValueError, match="not contiguous"):
            files.read("weight", torch.ones(8)[::2])
        with pytest.raises(ValueError, match="on meta"):
            files.write("meta", torch.ones(4, device="meta"))
    with pytest.raises(ValueError, match="was closed before 'late'"):
        files.write("late", torch.ones(1))
