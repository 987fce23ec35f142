"""Nested values (tuples, dicts, ModelOutputs, caches) taken apart into tensors and a template that rebuilds them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from graphopt._torch import pytree


@dataclass(frozen=True)
class _Slot:
    """Where the tensor of this index goes."""

    index: int


@dataclass(frozen=True)
class _Object:
    """An object that is no known container but holds tensors among its attributes, such as a key/value cache."""

    kind: type
    attributes: dict[str, "Template"]


@dataclass(frozen=True)
class Template:
    """A nested value without its tensors."""

    leaves: tuple[Any, ...]
    spec: pytree.TreeSpec

    def build(self, tensors: Sequence[Any]) -> Any:
        """The value, with `tensors` (in the order of `take_apart`) in their places."""
        return pytree.tree_unflatten([_build_leaf(leaf, tensors) for leaf in self.leaves], self.spec)


def take_apart(value: Any, tensors: list[torch.Tensor]) -> Template:
    """Append the tensors in `value` to `tensors`, each once, and return the template of the rest."""
    leaves, spec = pytree.tree_flatten(value)
    return Template(tuple(_take_leaf(leaf, tensors) for leaf in leaves), spec)


def _take_leaf(leaf: Any, tensors: list[torch.Tensor]) -> Any:
    if isinstance(leaf, torch.Tensor):
        for index, known in enumerate(tensors):
            if known is leaf:
                return _Slot(index)
        tensors.append(leaf)
        return _Slot(len(tensors) - 1)
    if _holds_tensors(leaf, depth=4):
        return _Object(type(leaf), {name: take_apart(part, tensors) for name, part in vars(leaf).items()})
    return leaf


def _build_leaf(leaf: Any, tensors: Sequence[Any]) -> Any:
    if isinstance(leaf, _Slot):
        return tensors[leaf.index]
    if isinstance(leaf, _Object):
        built: Any = object.__new__(leaf.kind)
        vars(built).update({name: part.build(tensors) for name, part in leaf.attributes.items()})
        return built
    return leaf


def _holds_tensors(leaf: Any, depth: int) -> bool:
    """Whether a tensor is reachable through attributes and containers, at most `depth` objects deep."""
    if isinstance(leaf, torch.Tensor):
        return True
    if depth == 0 or isinstance(leaf, (type, torch.nn.Module)) or not hasattr(leaf, "__dict__"):
        return False
    return any(_holds_tensors(part, depth - 1) for part in pytree.tree_leaves(list(vars(leaf).values())))
