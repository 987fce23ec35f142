"""Whatever happens to a disk or a file is an error that names it, at the wait or at close; nothing hangs or is lost."""

import concurrent.futures
import contextlib
import errno
import itertools
import json
import logging
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from graphopt.errors import OffloadError
from graphopt.runtime.files import TensorFiles

PAGE = 4096
VALUES = torch.arange(50_000)


def _flip(path: Path, at: int) -> None:
    """Change one byte in the way a disk would: nothing but the byte tells."""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def _replace(path: Path, _: int = 0) -> None:
    shutil.copy2(path, path.with_name("copy"))
    path.with_name("copy").rename(path)


def _touch(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"\1")


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "removed": (Path.unlink, "No such file"),
    "folder removed": (lambda path: shutil.rmtree(path.parent), "the folder .* is missing"),
    "truncated": (lambda path: os.truncate(path, 3 * PAGE), f"has {3 * PAGE} bytes, not the"),
    "truncated within a page": (lambda path: os.truncate(path, 100), "has 100 bytes, not the"),
    "longer": (lambda path: os.truncate(path, 1 << 20), f"has {1 << 20} bytes, not the"),
    "changed": (_touch, "something else has changed it"),
    "replaced": (_replace, "something else has changed it"),
    "bit flipped in a block": (lambda path: _flip(path, 3 * PAGE), r"block \d+ \(at byte \d+\) has checksum"),
    "bit flipped in a trailer": (lambda path: _flip(path, 2 * PAGE), r"block 0 \(at byte 0\) has checksum"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_damage_is_found_at_reading(tmp_path: Path, fault: str) -> None:
    harm, said = FAULTS[fault]
    folder = tmp_path / "files"
    with TensorFiles(folder, block_size=2 * PAGE, checked=True) as files:
        files.write("layers.0.weight", VALUES).wait()
        files.write("other", VALUES).wait()
        path = folder / "layers.0.weight.tensor"
        harm(path)
        read = files.read("layers.0.weight", context="step 7")
        with pytest.raises(OffloadError, match=rf"^step 7: cannot read 'layers.0.weight' from {path}: .*{said}"):
            read.wait()
        if fault != "folder removed":
            assert torch.equal(files.read("other").wait(), VALUES)
            files.write("layers.0.weight", VALUES).wait()  # and is over once it is written anew
            assert torch.equal(files.read("layers.0.weight").wait(), VALUES)


def test_a_file_of_two_writes_is_found(tmp_path: Path) -> None:
    """A disk that lost the write of one block leaves an older one there, with a checksum that is right."""
    path = tmp_path / "a.tensor"
    with TensorFiles(tmp_path, block_size=PAGE, checked=True) as files:
        files.write("a", torch.zeros(2 * PAGE)).wait()
        old = path.read_bytes()
        files.write("a", torch.ones(2 * PAGE)).wait()
        status = path.stat()
        with path.open("r+b") as file:
            file.write(old[: 2 * PAGE])
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        with pytest.raises(OffloadError, match="blocks come from different writes"):
            files.read("a").wait()
    with (
        TensorFiles(tmp_path, block_size=PAGE, checked=True) as files,
        pytest.raises(OffloadError, match="blocks come from different writes"),
    ):
        files.read("a", torch.ones(2 * PAGE)).wait()


def test_a_file_that_ends_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv
    with TensorFiles(tmp_path, block_size=PAGE) as files:
        files.write("a", VALUES).wait()

        def truncating(file: int, views: list[memoryview], offset: int) -> int:
            os.truncate(tmp_path / "a.tensor", 3 * PAGE)
            return real(file, views, offset)

        monkeypatch.setattr(os, "preadv", truncating)
        with pytest.raises(OffloadError, match=r"the file ends at byte \d+, 4096 bytes too early"):
            files.read("a").wait()


def test_short_writes_and_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("preadv", "pwritev"):
        real = getattr(os, name)
        monkeypatch.setattr(
            os,
            name,
            lambda file, views, offset, real=real: real(file, [views[0][: max(PAGE, len(views[0]) // 2)]], offset),
        )
    with TensorFiles(tmp_path, block_size=5 * PAGE, checked=True) as files:
        files.write("a", VALUES).wait()
        assert torch.equal(files.read("a").wait(), VALUES)


def _failing(after: int, code: int) -> Callable[..., int]:
    calls = iter(range(10**6))
    real = os.pwritev

    def write(file: int, views: list[memoryview], offset: int) -> int:
        if next(calls) >= after:
            raise OSError(code, os.strerror(code))
        return real(file, views, offset)

    return write


def test_a_disk_that_fails_in_the_middle_leaves_nothing_under_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with TensorFiles(tmp_path, block_size=PAGE) as files:
        files.write("a", VALUES).wait()
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwritev", _failing(5, errno.EIO))
            write, read = files.write("a", VALUES + 1, "step 1"), files.read("a", context="step 2")
            with pytest.raises(OffloadError, match=rf"^step 1: cannot write 'a' to {tmp_path}/a.tensor: Input/output"):
                write.wait()
            with pytest.raises(OffloadError, match=r"step 2: .*its last write failed.*Input/output error"):
                read.wait()
        assert not list(tmp_path.iterdir())
        files.write("a", VALUES).wait()
        assert torch.equal(files.read("a").wait(), VALUES)


def test_an_error_that_nobody_waited_for_is_raised_by_close(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pwritev", _failing(1, errno.ENOSPC))  # the first one finds out about direct I/O
    files = TensorFiles(tmp_path, block_size=PAGE)
    for name in "ab":
        files.write(name, VALUES, "step 3")
    with pytest.raises(OffloadError, match=r"No space left on device; the file takes 392\.0 KiB") as caught:
        files.close()
    assert caught.value.__notes__ == ["1 more transfers failed"]
    assert isinstance(caught.value.__cause__, OSError)
    files.close()  # it is told once


def test_an_error_does_not_hide_another(tmp_path: Path, monkeypatch, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(KeyError, match="mine"), TensorFiles(tmp_path, block_size=PAGE) as files:
        monkeypatch.setattr(os, "pwritev", _failing(0, errno.ENOSPC))
        files.write("a", VALUES)
        raise KeyError("mine")
    assert "No space left on device" in caplog.text


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OffloadError, match=rf"cannot write to the folder {tmp_path}/file/inside: Not a directory"):
        TensorFiles(tmp_path / "file" / "inside")


def test_a_file_system_without_direct_io(tmp_path: Path, monkeypatch, caplog: pytest.LogCaptureFixture) -> None:
    real = os.open

    def refusing(path: str, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(path, flags, mode)

    monkeypatch.setattr(os, "open", refusing)
    with caplog.at_level(logging.WARNING, "graphopt"), TensorFiles(tmp_path) as files:
        files.write("a", VALUES).wait()
        assert torch.equal(files.read("a").wait(), VALUES)
    (line,) = caplog.messages
    assert (
        line == f"files in {tmp_path} go through the page cache: no direct I/O, its file system says 'Invalid argument'"
    )


def fill(folder: str, limit: int) -> tuple[list[str], list[str]]:
    """Write a small tensor and three of 4 MiB; what was said, and the files that are left.

    limit: bytes that a file may have; 0 for any.
    """
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    said = []
    with TensorFiles(folder, block_size=1 << 16) as files:
        files.write("small", VALUES).wait()
        for write in [files.write(f"large{i}", torch.zeros(1 << 20), f"step {i}") for i in range(3)]:
            try:
                write.wait()
            except OffloadError as error:
                said.append(str(error))
        assert torch.equal(files.read("small").wait(), VALUES)
    return said, sorted(os.listdir(folder))


def test_a_limit_of_the_size_of_files(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(1, context) as pool:
        said, names = pool.submit(fill, str(tmp_path), 1 << 20).result(timeout=60)
    assert [line.partition(" to ")[0] for line in said] == [f"step {i}: cannot write 'large{i}'" for i in range(3)]
    assert all(line.endswith("File too large") for line in said)
    assert names == ["small.tensor"]


_IN_OWN_NAMESPACE = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c")
_IS_ALLOWED = subprocess.run([*_IN_OWN_NAMESPACE, "true"], capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(
    not _IS_ALLOWED, reason="no mounts without privileges here; the test above fails files by their size"
)
def test_a_full_disk(tmp_path: Path) -> None:
    script = f"import json; from {__name__} import fill; print(json.dumps(fill({str(tmp_path)!r}, 0)))"
    mount = f'mount -t tmpfs -o size=6m tmpfs {tmp_path} && exec "$@"'
    command = [*_IN_OWN_NAMESPACE, mount, "sh", sys.executable, "-c", script]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert found.returncode == 0, found.stderr
    said, names = json.loads(found.stdout)
    assert len(said) == 2 and len(names) == 2  # one of the large ones fitted
    assert all("No space left on device; the file takes 4.0 MiB" in line for line in said)


def _write_endlessly(folder: str, progress: Connection) -> None:
    files = TensorFiles(folder, block_size=1 << 14, checked=True)
    for value in itertools.count():
        files.write("a", torch.full([1 << 18], value)).wait()
        progress.send(value)


def test_a_process_killed_while_it_writes_leaves_a_whole_file_or_none(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    found = 0
    for attempt in range(12):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_write_endlessly, args=(str(tmp_path), theirs))
        process.start()
        theirs.close()
        last = ours.recv()
        time.sleep(attempt * 0.0011)
        process.kill()
        process.join()
        with contextlib.suppress(EOFError):
            while True:
                last = ours.recv()
        with TensorFiles(tmp_path, block_size=1 << 14, checked=True) as files:
            read = files.read("a", torch.zeros(1 << 18, dtype=torch.int64))
            if (tmp_path / "a.tensor").exists():
                values = read.wait().unique()
                assert values.numel() == 1 and values.item() in (last, last + 1)
            else:
                found += 1
                with pytest.raises(OffloadError, match=r"a\.tensor\.part is what an interrupted write left"):
                    read.wait()
    assert found, "no write was interrupted"
