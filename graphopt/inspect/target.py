"""What to inspect: ``package.module:factory`` or ``file.py:factory``, which returns a model and example inputs."""

import functools
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from graphopt.capture.call import as_call
from graphopt.errors import GraphoptError
from graphopt.nearest import nearest


class TargetError(GraphoptError):
    """A target that names no usable factory."""


def load_target(target: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """The model and the example call (args, kwargs) that the factory gives. Raises TargetError."""
    place, colon, name = target.rpartition(":")
    if not colon or not place:
        raise TargetError(f"{target!r} names no factory; write package.module:factory or file.py:factory")
    module = _module(place)
    factory = getattr(module, name, None)
    if not callable(factory):
        functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise TargetError(f"{place} has no factory {name!r}; {nearest(name, functions)}")
    try:
        made = factory()
    except Exception as error:
        raise TargetError(f"{target} raised {type(error).__name__}: {' '.join(str(error).split())}") from error
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module)):
        raise TargetError(f"{target} returned a {type(made).__name__}; return (model, example_inputs)")
    model, (args, kwargs) = made[0], as_call(made[1])
    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        takes = inspect.signature(model.forward)
        raise TargetError(f"{target}: {type(model).__name__}.forward{takes} cannot be called: {error}") from error
    return model, args, kwargs


def _module(place: str) -> ModuleType:
    if place.endswith(".py"):
        path = Path(place)
        if not path.is_file():
            others = [str(p) for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
            raise TargetError(f"there is no file {place}; {nearest(place, others)}")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        _executed(place, functools.partial(spec.loader.exec_module, module))
        return module
    if "" not in sys.path:
        sys.path.insert(0, "")
    module = _executed(place, functools.partial(importlib.import_module, place))
    assert isinstance(module, ModuleType)
    return module


def _executed(place: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except ModuleNotFoundError as error:
        raise TargetError(f"{place} cannot be imported: {error}; is it installed, or in this folder?") from error
    except Exception as error:
        raise TargetError(f"{place} cannot be imported: {type(error).__name__}: {error}") from error
