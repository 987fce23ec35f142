"""Gradients summed over microbatches first and over ranks once."""

from collections.abc import Collection, Mapping

import torch

from graphopt.ir import ParameterLayout
from graphopt.runtime.collectives import Collectives

_BUCKET_BYTES = 32 << 20


class UnreducedGradients:
    """Whole gradients of this rank, added up over backward passes that do not reduce."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}

    def __bool__(self) -> bool:
        return bool(self._sums)

    def add(self, gradients: Mapping[str, torch.Tensor], own: Collection[str] = ()) -> None:
        """Add this pass's gradients, by parameter name. own: those that nobody else reads, which may be written to."""
        for name, gradient in gradients.items():
            known = self._sums.get(name)
            if known is None:
                self._sums[name] = gradient if name in own else gradient.clone()
            else:
                known.add_(gradient)

    def take(self) -> dict[str, torch.Tensor]:
        """The sums; none are left behind."""
        sums, self._sums = self._sums, {}
        return sums


def reduce_gradients(
    gradients: Mapping[str, torch.Tensor], layouts: Mapping[str, ParameterLayout], collectives: Collectives
) -> dict[str, torch.Tensor]:
    """The mean over data-parallel ranks of their `gradients`: padded shards of sharded ones, in the stored dtype."""
    reduced: dict[str, torch.Tensor] = {}
    for names in _buckets(gradients, layouts):
        layout = layouts[names[0]]
        if layout.is_whole:
            pending = collectives.all_reduce([gradients[name] for name in names], layout.axis)
        else:
            pending = collectives.reduce_scatter([_rows(gradients[name], layouts[name]) for name in names], layout.axis)
        for index, name in enumerate(names):
            reduced[name] = (pending.take(index) / layouts[name].ranks).to(layouts[name].dtype)
    return reduced


def _rows(gradient: torch.Tensor, layout: ParameterLayout) -> torch.Tensor:
    """[ranks * shard rows, ...], the last rows zero where padded."""
    rows = gradient.reshape(layout.rows, *layout.row_shape)
    missing = layout.gathered_shape[0] - layout.rows
    return torch.nn.functional.pad(rows, [0, 0] * len(layout.row_shape) + [0, missing]) if missing else rows


def _buckets(gradients: Mapping[str, torch.Tensor], layouts: Mapping[str, ParameterLayout]) -> list[list[str]]:
    """Names that one collective may serve: alike in dtype, axis and kind, up to a number of bytes."""
    open_buckets: dict[tuple[object, ...], tuple[list[str], int]] = {}
    buckets: list[list[str]] = []
    for name, gradient in gradients.items():
        layout = layouts[name]
        kind = (gradient.dtype, layout.axis, layout.is_whole)
        size = gradient.numel() * gradient.element_size()
        names, filled = open_buckets.get(kind, ([], 0))
        if not names or filled + size > _BUCKET_BYTES:
            names, filled = [], 0
            buckets.append(names)
        names.append(name)
        open_buckets[kind] = (names, filled + size)
    return buckets
