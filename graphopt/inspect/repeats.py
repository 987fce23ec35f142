"""Blocks of a model that are alike: the layers that a reader wants to see once."""

import itertools
from collections import defaultdict
from collections.abc import Hashable

from graphopt.inspect.recorder import Stage

Shape = tuple[Hashable, ...]


def repeated_blocks(captured: Stage) -> list[list[str]]:
    """Runs of neighbouring blocks with the same operations on the same shapes, by module path.

    captured: the stage after capture; what later passes do to a block does not make it another.
    """
    shapes: defaultdict[str, list[Hashable]] = defaultdict(list)
    for record in captured.nodes:
        layer = record.facts.layer
        if layer is not None and record.kind == "call":
            inside = record.facts.module.removeprefix(layer)
            shapes[layer].append((record.target, record.value, inside))
    runs = itertools.groupby(shapes, key=lambda layer: (layer.rpartition(".")[0], tuple(shapes[layer])))
    return [run for run in (list(layers) for _, layers in runs) if len(run) > 1]
