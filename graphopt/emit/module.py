"""Emitted source -> functions, by way of a file that a person can read, step through and import."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from graphopt.artifacts import write_file

EmittedFunction = Callable[[list[Any], Any], list[Any]]


def write_source(source: str, name: str) -> Path:
    """Write `source` under a name that its content decides; safe when many processes do so at once."""
    return write_file(name, ".py", source)


def load_source(path: Path) -> ModuleType:
    """Import an emitted file, outside of `sys.modules`."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
