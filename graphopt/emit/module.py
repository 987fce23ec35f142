"""Emitted source -> functions, by way of a file that a person can read, step through and import."""

import hashlib
import importlib.util
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

EmittedFunction = Callable[[list[Any], Any], list[Any]]


def source_directory() -> Path:
    """Where emitted programs are kept: ``$GRAPHOPT_SOURCE_DIR``, or a folder of this user's in the temporary one."""
    configured = os.environ.get("GRAPHOPT_SOURCE_DIR")
    return Path(configured) if configured else Path(tempfile.gettempdir()) / f"graphopt-{os.getuid()}"


def write_source(source: str, name: str) -> Path:
    """Write `source` under a name that its content decides; safe when many processes do so at once."""
    folder = source_directory()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}_{hashlib.sha256(source.encode()).hexdigest()[:12]}.py"
    if not path.exists():
        descriptor, temporary = tempfile.mkstemp(dir=folder, suffix=".partial")
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(source)
        os.replace(temporary, path)
    return path


def load_source(path: Path) -> ModuleType:
    """Import an emitted file, outside of `sys.modules`."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
