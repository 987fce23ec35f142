"""What each kernel in CUDA takes of a GPU: registers, spills and shared memory, as nvcc leaves it, without a GPU.

The table is resources.json, which ``python -m graphopt.cuda_ext.resources`` writes anew.
"""

import hashlib
import json
import re
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from graphopt.cuda_ext.cuda import FLAGS, TARGETS, nvcc
from graphopt.cuda_ext.native import BuildError

TABLE = Path(__file__).with_name("resources.json")
REGISTERS = 65536  # of a multiprocessor: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"
_KERNEL = re.compile(
    r"Compiling entry function '(?P<kernel>\w+)' for 'sm_(?P<capability>\d+)'"
    r".*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r".*?Used (?P<registers>\d+) registers(?:[^\n]*?(?P<shared>\d+) bytes smem)?",
    re.DOTALL,
)


def sources() -> list[Path]:
    return sorted(TABLE.parent.glob("*.cu"))


def measured(source: Path, library: Path) -> list[dict[str, Any]]:
    """The kernels of a source, which is built to `library` for every target. Raises BuildError."""
    compiler = nvcc()
    command = [*compiler.found(), *compiler.flags, "--resource-usage", "-o", str(library), str(source)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode:
        raise BuildError(f"{command[0]} failed on {source}:\n{found.stderr.strip()}")
    rows = [match.groupdict(default="0") for match in _KERNEL.finditer(found.stdout + found.stderr)]
    names = _readable([row["kernel"] for row in rows])
    numbers = ("registers", "stack", "stores", "loads", "shared")
    kernels = [
        {"capability": int(row["capability"]), "source": source.name, "kernel": name}
        | {number: int(row[number]) for number in numbers}
        for row, name in zip(rows, names, strict=True)
    ]
    return sorted(kernels, key=lambda kernel: (kernel["capability"], kernel["kernel"]))


def version() -> str:
    """Of nvcc. Raises BuildError if there is none."""
    said = subprocess.run([*nvcc().found(), "--version"], capture_output=True, text=True, check=True).stdout
    return said.rpartition(" V")[2].split()[0]


def hash_of_sources() -> str:
    """Of the text that the table follows from."""
    texts = [(file.name, file.read_text()) for file in sorted(_with_headers(sources()))]
    return hashlib.sha256(repr((texts, FLAGS, TARGETS)).encode()).hexdigest()


def _with_headers(files: Iterable[Path]) -> set[Path]:
    found: set[Path] = set()
    due = [*files]
    while due:
        file = due.pop()
        if file not in found:
            found.add(file)
            due += [file.with_name(name) for name in re.findall(r'#include "(.+)"', file.read_text())]
    return found


def _readable(names: list[str]) -> list[str]:
    """Names as in the source: c++filt comes with the compilers that nvcc needs."""
    said = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    plain = [re.sub(r"^void |\(anonymous namespace\)::|\(.*\)$| (?=>)", "", line) for line in said.splitlines()]
    return [name.replace("unsigned short", "bf16") for name in plain]


def _write() -> None:
    with tempfile.TemporaryDirectory() as folder:
        kernels = [kernel for source in sources() for kernel in measured(source, Path(folder) / f"{source.stem}.so")]
    rows = ",\n".join(map(json.dumps, kernels))
    head = f'"nvcc": "{version()}",\n"sources": "{hash_of_sources()}"'
    TABLE.write_text(f'{{{head},\n"kernels": [\n{rows}\n]}}\n')


if __name__ == "__main__":
    _write()
