"""Copies by themselves: every bit and stride comes back, in whatever order, and what goes wrong is said by the wait."""

import concurrent.futures
import gc
import multiprocessing
import resource
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from graphopt.errors import OffloadError
from graphopt.runtime.copies import Copies

CPU = torch.device("cpu")
PLACES = ("host", "disk")


def _values() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "float32": torch.randn(3, 5, 7),
        "bfloat16": torch.randn(33).bfloat16(),
        "bool": torch.rand(17) < 0.5,
        "uint8": torch.randint(0, 256, (3, 3), dtype=torch.uint8),
        "float64": torch.randn(5, 2, dtype=torch.float64),
        "complex64": torch.randn(4, dtype=torch.complex64),
        "transposed": torch.randn(4, 6).T,
        "permuted": torch.randn(2, 3, 5).permute(2, 0, 1),
        "channels last": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        "part of a larger one": torch.randn(10, 4)[3:7],
        "one element": torch.randn(1, 1),
        "no dimension": torch.tensor(2.5),
        "no elements": torch.empty(0, 3),
        "no elements, bool": torch.empty(5, 0, dtype=torch.bool),
        "not a number": torch.tensor([float("nan"), float("inf"), -0.0]),
        "more than a page": torch.arange(5000),
        "wants a gradient": torch.randn(6, requires_grad=True),
    }


VALUES = _values()


def _bits(tensor: torch.Tensor) -> list[int]:
    return torch.cat([torch.empty(0, dtype=torch.uint8), tensor.detach().reshape(-1).view(torch.uint8)]).tolist()


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("place", PLACES)
def test_what_comes_back_is_the_value_in_every_bit_and_stride(tmp_path: Path, place: str, name: str) -> None:
    copies, value = Copies(CPU, tmp_path), VALUES[name]
    kept = copies.out(value, place, name).wait()
    for _ in range(2):  # a backward may run again
        back = copies.back(kept).wait()
        assert (back.dtype, back.shape, back.stride()) == (value.dtype, value.shape, value.stride())
        assert _bits(back) == _bits(value)
        assert not back.requires_grad
        assert back.untyped_storage().data_ptr() != value.untyped_storage().data_ptr() or value.numel() == 0


@pytest.mark.parametrize("place", PLACES)
def test_a_value_may_change_once_it_has_left(tmp_path: Path, place: str) -> None:
    copies, value = Copies(CPU, tmp_path), torch.arange(100.0)
    kept = copies.out(value, place, "value").wait()
    value.zero_()
    assert torch.equal(copies.back(kept).wait(), torch.arange(100.0))


def _files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*.tensor"))


def test_files_are_made_for_what_is_there_and_used_again(tmp_path: Path) -> None:
    copies = Copies(CPU, tmp_path)
    assert not list(tmp_path.iterdir()), "a folder is made at the first copy to disk"
    first = copies.out(torch.ones(10), "disk", "a").wait()
    second = copies.out(torch.zeros(10), "disk", "b").wait()
    assert len(_files(tmp_path)) == 2
    del first
    third = copies.out(torch.full((5, 2), 3.0), "disk", "c").wait()  # as many bytes
    assert len(_files(tmp_path)) == 2
    other = copies.out(torch.full((11,), 4.0), "disk", "d").wait()
    assert len(_files(tmp_path)) == 3
    found = [copies.back(kept).wait().unique().tolist() for kept in (second, third, other)]
    assert found == [[0.0], [3.0], [4.0]]
    del copies, second, third, other
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_a_file_is_read_before_it_is_used_again(tmp_path: Path) -> None:
    copies = Copies(CPU, tmp_path)
    for number in range(20):
        kept = copies.out(torch.full((50_000,), number), "disk", "old").wait()
        arriving = copies.back(kept)
        del kept  # its file is free for the next, which is written while it is read
        leaving = copies.out(torch.full((50_000,), -1), "disk", "new")
        assert arriving.wait().eq(number).all()
        leaving.wait()
        del leaving
    assert len(_files(tmp_path)) == 1


@pytest.mark.parametrize("place", PLACES)
def test_many_copies_are_under_way_at_once(tmp_path: Path, place: str) -> None:
    copies = Copies(CPU, tmp_path)
    copies.out(torch.zeros(1), place, "first").wait()

    def there_and_back(thread: int) -> bool:
        values = [torch.full((1000 + thread,), 100 * thread + index) for index in range(40)]
        leaving = [copies.out(value, place, "value") for value in values]
        arriving = [copies.back(each.wait()) for each in reversed(leaving)]
        return all(torch.equal(a.wait(), value) for a, value in zip(reversed(arriving), values, strict=True))

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(there_and_back, range(4))) == [True] * 4


def _said_within(folder: Path, limit: int) -> tuple[str, bool]:
    """Of a value larger than `limit` bytes, what the wait says; and whether a smaller one goes and comes then."""
    copies = Copies(CPU, folder)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    with pytest.raises(OffloadError) as caught:
        copies.out(torch.zeros(limit), "disk", "attention_3").wait()
    small = torch.arange(10)
    return str(caught.value), torch.equal(copies.back(copies.out(small, "disk", "small").wait()).wait(), small)


def test_a_disk_without_room_is_named_by_the_wait(tmp_path: Path) -> None:
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        said, goes_on = pool.submit(_said_within, tmp_path, 1 << 16).result(timeout=60)
    assert said.startswith("saving attention_3 for backward: cannot write ")
    assert str(tmp_path) in said and said.endswith("File too large")
    assert goes_on


def test_a_file_that_is_gone_is_named_by_the_wait(tmp_path: Path) -> None:
    copies = Copies(CPU, tmp_path)
    kept = copies.out(torch.arange(10), "disk", "mul_7").wait()
    (file,) = tmp_path.rglob("*.tensor")
    file.unlink()
    with pytest.raises(OffloadError, match=r"^getting mul_7 back for backward: cannot read .*\.tensor: No such file"):
        copies.back(kept).wait()
