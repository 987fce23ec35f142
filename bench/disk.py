"""Throughput of tensors in files, beside fio doing the same: same file system, file size, block, depth, direct I/O."""

import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bench.statistics import paired_ratios, spread
from graphopt.runtime.files import TensorFiles, page_aligned

ENGINES = ("psync", "io_uring")  # a thread for each request, as graphopt has them; one thread with all of them


def throughput(folder: Path, size: int, block: int, depth: int, rounds: int) -> dict[str, Any]:
    """Bytes a second, writing over and reading a file of `size` bytes, in turns: graphopt, with checksums, fio.

    `depth` requests of `block` bytes are under way at a time. The first round is not counted. Raises SystemExit if fio
    is not installed or fails.
    """
    if shutil.which("fio") is None:
        raise SystemExit("fio is not installed, and it is what we compare with: apt-get install fio")
    seconds: dict[str, dict[str, list[list[float]]]] = {"write": {}, "read": {}}
    tensor = page_aligned([size], torch.uint8).random_(generator=torch.Generator().manual_seed(0))
    with (
        tempfile.TemporaryDirectory(prefix="bench-", dir=folder) as inside,
        TensorFiles(Path(inside, "plain"), block_size=block, depth=depth) as plain,
        TensorFiles(Path(inside, "checked"), block_size=block, depth=depth, checked=True) as checked,
    ):
        runs: dict[str, Callable[[str], float]] = {
            f"fio {e}": _fio(e, Path(inside), size, block, depth) for e in ENGINES
        }
        runs |= {"graphopt": _ours(plain, tensor), "graphopt, checked": _ours(checked, tensor)}
        for turn in tqdm(range(rounds + 1), desc="rounds"):
            for name, run in runs.items():
                for direction, each in seconds.items():
                    taken = run(direction)
                    if turn:
                        each.setdefault(name, []).append([taken])
    return {
        "is_direct": plain.is_direct,
        "bytes_per_second": {
            direction: {name: asdict(spread([size / t for (t,) in turns])) for name, turns in each.items()}
            for direction, each in seconds.items()
        },
        "ratios": {
            direction: {f"fio {e}": _ratios(each, f"fio {e}") for e in ENGINES} for direction, each in seconds.items()
        },
    }


def _ratios(seconds: dict[str, list[list[float]]], reference: str) -> dict[str, Any]:
    """Throughput as a share of the reference's, round by round."""
    inverse = {name: [[1 / t for t in turn] for turn in turns] for name, turns in seconds.items()}
    return {name: asdict(ratio) for name, ratio in paired_ratios(inverse, reference).items() if name != reference}


def _ours(files: TensorFiles, tensor: torch.Tensor) -> Callable[[str], float]:
    files.write("tensor", tensor).wait()
    out = page_aligned(tensor.shape, tensor.dtype)

    def run(direction: str) -> float:
        started = time.perf_counter()
        (files.write("tensor", tensor) if direction == "write" else files.read("tensor", out)).wait()
        return time.perf_counter() - started

    return run


def _fio(engine: str, folder: Path, size: int, block: int, depth: int) -> Callable[[str], float]:
    """Seconds that fio took from its first request to its last."""
    if engine == "psync":
        share = size // depth // block * block
        pattern = [f"--numjobs={depth}", "--thread", f"--size={share}", f"--offset_increment={share}"]
        moved = share * depth
    else:
        pattern, moved = [f"--iodepth={depth}", f"--size={size}"], size

    def run(direction: str) -> float:
        command = ["fio", "--name=job", f"--filename={folder / engine}", f"--rw={direction}", f"--bs={block}"]
        options = [
            "--direct=1",
            f"--ioengine={engine}",
            "--group_reporting",
            "--output-format=json",
            "--fallocate=posix",
        ]
        found = subprocess.run([*command, *options, *pattern], capture_output=True, text=True, check=False)
        if found.returncode:
            raise SystemExit(f"fio failed: {found.stderr or found.stdout}")
        job = json.loads(found.stdout)["jobs"][0][direction]
        assert job["io_bytes"] == moved
        return float(job["runtime"]) / 1000 * size / moved

    run("write")  # lays the file out
    return run
