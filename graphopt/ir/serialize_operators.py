"""What a node calls, by a public path: ``aten.add.Tensor``, ``operator:getitem``, ``math:ceil``, ``torch:sym_max``."""

import importlib
from collections.abc import Callable
from typing import Any

import torch

from graphopt._torch import OpOverload
from graphopt.errors import GraphoptError
from graphopt.nearest import nearest


def operator_path(target: Any) -> str:
    """The path of an operator or function. Raises ValueError for one that cannot be found again by a path."""
    if isinstance(target, OpOverload):
        return str(target)
    module = getattr(target, "__module__", "").replace("_operator", "operator")
    path = f"{module}:{getattr(target, '__qualname__', '')}"
    try:
        found = operator_at(path)
    except GraphoptError:
        found = None
    if found is not target:
        raise ValueError(f"calls {target}, which is neither an operator nor a function of a module")
    return path


def operator_at(path: str) -> Callable[..., Any]:
    """What `operator_path` gave the path of. Raises GraphoptError with the nearest valid choice if there is none."""
    module, colon, name = path.partition(":")
    if not colon:
        return _attribute(torch.ops, path, path)
    try:
        home = importlib.import_module(module)
    except (ImportError, ValueError) as error:
        raise GraphoptError(f"there is no function {path}: {error}") from error
    return _attribute(home, name, path)


def _attribute(home: Any, names: str, path: str) -> Callable[..., Any]:
    found = home
    for name in names.split("."):
        try:
            found = getattr(found, name)
        except AttributeError as error:
            raise GraphoptError(f"there is no operator {path}; {nearest(name, _choices(found))}") from error
    assert callable(found)
    return found  # type: ignore[no-any-return]


def _choices(home: Any) -> list[str]:
    """The overloads of an operator, the operators of a namespace that are known so far, the names of a module."""
    names = home.overloads() if hasattr(home, "overloads") else dir(home)
    return [name for name in names if not name.startswith("_")]
