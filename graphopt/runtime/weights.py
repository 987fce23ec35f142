"""Weights from files into a compiled model: each rank reads what lies on it, by name."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from graphopt.errors import GraphoptError
from graphopt.nearest import listed, nearest
from graphopt.runtime.agreement import failing_together
from graphopt.runtime.parameters import lies_here, own_slices
from graphopt.runtime.state import Runtime
from graphopt.runtime.unloaded import aliases, persistent
from graphopt.runtime.weight_files import Wanted, WeightFiles, open_weights


@torch.no_grad()
def load_weights(
    model: nn.Module, runtime: Runtime, path: str | Path, *, prefix: str | None = None, strict: bool = True
) -> None:
    """As `graphopt.load_weights` says."""
    with failing_together(dist.group.WORLD if dist.is_initialized() else None):
        layouts = runtime.require_settled()
        files = open_weights(path)
        tensors, names = persistent(model), aliases(model)
        prefix = _prefix(files, names) if prefix is None else prefix
        places = _places(files, tensors, names, prefix)
        if strict:
            _require_all(files, tensors, names, places, prefix)
        _require_shapes(files, tensors, places)
        here = {first: stored for first, stored in places.items() if lies_here(tensors[first])}
        files.read(
            {
                stored: Wanted(tensors[first], own_slices(tensors[first], layouts.get(first)))
                for first, stored in here.items()
            }
        )
        runtime.unloaded.difference_update(places)
    runtime.resident.invalidate()


def _prefix(files: WeightFiles, names: dict[str, str]) -> str:
    """What stands before the model's names in the files: a checkpoint may hold more than a model's weights."""
    found: Counter[str] = Counter()
    for stored in files.shapes:
        parts = stored.split(".")
        for count in range(len(parts)):
            if ".".join(parts[count:]) in names:
                found[stored[: len(stored) - len(".".join(parts[count:]))]] += 1
    first, second = [*found.most_common(2), ("", 0), ("", 0)][:2]
    if first[1] and first[1] == second[1]:
        raise GraphoptError(
            f"the files have this model's names behind {first[0]!r} and behind {second[0]!r}; say prefix={first[0]!r}"
        )
    return first[0]


def _places(
    files: WeightFiles, tensors: Mapping[str, torch.Tensor], names: dict[str, str], prefix: str
) -> dict[str, str]:
    """The name in the files of each tensor, by its first name; of a tied one any name may be there."""
    found = {first: prefix + name for name, first in reversed(names.items()) if prefix + name in files.shapes}
    return {first: stored for first, stored in found.items() if first in tensors}


def _require_all(
    files: WeightFiles, tensors: Mapping[str, torch.Tensor], names: dict[str, str], places: Mapping[str, str],
    prefix: str,
) -> None:  # fmt: skip
    missing = [name for name in tensors if name not in places]
    known = {prefix + name for name, first in names.items() if first in tensors}
    unexpected = [stored for stored in files.shapes if stored.startswith(prefix) and stored not in known]
    if not missing and not unexpected:
        return
    said = []
    if missing:
        near = nearest(missing[0], unexpected) if unexpected else "there is none to choose"
        said.append(f"the files lack {listed(missing)} (for {missing[0]} {near})")
    if unexpected:
        said.append(f"the model has no {listed(unexpected)}")
    raise GraphoptError(f"{'; '.join(said)}; say strict=False to load what both have")


def _require_shapes(files: WeightFiles, tensors: Mapping[str, torch.Tensor], places: Mapping[str, str]) -> None:
    wrong = [
        f"{name} is {list(tensors[name].shape)}, {list(files.shapes[stored])} in the files"
        for name, stored in places.items()
        if tuple(tensors[name].shape) != files.shapes[stored]
    ]
    if wrong:
        raise GraphoptError("; ".join(wrong[:4]) + (f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""))
