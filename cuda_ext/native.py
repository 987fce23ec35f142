"""Native code behind a plain C ABI: built at its first use, kept in a cache, called through ctypes.

The cache is the folder ``$GRAPHOPT_CACHE``, else ``$XDG_CACHE_HOME/graphopt``, else ``~/.cache/graphopt``. A library is
named by a hash of all it is made from, so nothing in the folder is ever stale, and any of it may be deleted.

Sources take pointers and sizes and include no header of torch: they compile in a second, and fit every version of it.
Headers are those beside a source: a library is built again when any of them changes.
"""

import ctypes
import fcntl
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from graphopt.errors import GraphoptError

_DIGEST_BYTES = hashlib.sha256().digest_size


class BuildError(GraphoptError):
    """Native code that cannot be built or loaded here: the message says what is missing, or what the compiler said."""


@dataclass(frozen=True)
class Compiler:
    """What makes a shared library from a source of one language.

    variable: the environment variable that names the command; command: what is used without it.
    """

    variable: str
    command: str
    flags: tuple[str, ...]

    def found(self) -> list[str]:
        """The command and its fixed arguments. Raises BuildError if there is none such."""
        command = shlex.split(os.environ.get(self.variable) or self.command)
        if shutil.which(command[0]) is None:
            raise BuildError(f"there is no compiler {command[0]!r}: install it, or name another in ${self.variable}")
        return command


CPP = Compiler(
    "CXX",
    "g++",
    (
        *("-std=c++17", "-O3", "-shared", "-fPIC", "-fopenmp"),
        "-ffp-contract=off",  # where a multiply-add is fused is for the source to say
        *("-fno-math-errno", "-fno-trapping-math"),  # neither is looked at, and both keep loops from vectorizing
    ),
)


def load(source: Path, compiler: Compiler = CPP) -> ctypes.CDLL:
    """The library made from `source`; calls into it release the interpreter lock.

    Any number of processes may ask for it at once: one of them builds it. Raises BuildError.
    """
    library = _built(source, compiler)
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise BuildError(f"{source.name} was built, but cannot be loaded: {error}") from error


def cache_directory() -> Path:
    """Where libraries are kept."""
    configured = os.environ.get("GRAPHOPT_CACHE")
    if configured:
        return Path(configured)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "graphopt"


def _built(source: Path, compiler: Compiler) -> Path:
    command = compiler.found()
    folder = cache_directory()
    library = folder / f"{source.stem}-{_key(source, command, compiler.flags)}.so"
    if _is_intact(library):
        return library
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(library.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # let go by the kernel, also where the process dies
            if not _is_intact(library):
                _build(source, [*command, *compiler.flags], library)
    except OSError as error:
        raise BuildError(f"cannot write to the cache: {error}; $GRAPHOPT_CACHE names another folder") from error
    return library


def _key(source: Path, command: list[str], flags: tuple[str, ...]) -> str:
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False).stdout
    beside = sorted([*source.parent.glob("*.h"), *source.parent.glob("*.cuh")])
    headers = [(header.name, header.read_bytes()) for header in beside]
    identity = repr((source.read_bytes(), headers, command, version, flags, platform.machine()))
    return hashlib.sha256(identity.encode()).hexdigest()[:20]


def _build(source: Path, command: list[str], library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder) / library.name
        found = subprocess.run([*command, "-o", str(made), str(source)], capture_output=True, text=True, check=False)
        if found.returncode:
            raise BuildError(f"{command[0]} failed on {source}:\n{found.stderr.strip()}")
        content = made.read_bytes()
        made.write_bytes(content + hashlib.sha256(content).digest())  # loaders do not look behind the last section
        made.chmod(0o755)
        made.replace(library)


def _is_intact(library: Path) -> bool:
    """Whether the library is there and whole: mapping a truncated one would end the process."""
    if not library.exists():
        return False
    content = library.read_bytes()
    return hashlib.sha256(content[:-_DIGEST_BYTES]).digest() == content[-_DIGEST_BYTES:]
