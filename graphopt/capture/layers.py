"""Which modules are the repeated blocks of a model, found from repetition alone."""

from collections import Counter

from torch import nn


def repeated_layers(model: nn.Module) -> frozenset[str]:
    """Paths of the outermost modules that stand beside at least one sibling of their class under the same parent."""
    layers: set[str] = set()
    _collect(model, "", layers)
    return frozenset(layers)


def _collect(module: nn.Module, path: str, layers: set[str]) -> None:
    children = dict(module.named_children())
    composite = {name: child for name, child in children.items() if next(child.children(), None) is not None}
    counts = Counter(type(child) for child in composite.values())
    for name, child in children.items():
        child_path = f"{path}.{name}" if path else name
        if name in composite and counts[type(child)] > 1:
            layers.add(child_path)
        else:
            _collect(child, child_path, layers)


def layer_of(module_path: str, layers: frozenset[str]) -> str | None:
    """The repeated layer that `module_path` lies in, or None."""
    path = module_path
    while path:
        if path in layers:
            return path
        path = path.rpartition(".")[0]
    return None
