"""A batch as the microbatches of a step."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from graphopt.errors import PlanError


@dataclass(frozen=True)
class Part:
    """tensors: of the call, rows of those that hold the batch. rows: how many; share: of all there are."""

    tensors: list[torch.Tensor]
    rows: int
    share: float


def microbatches(tensors: Sequence[torch.Tensor], count: int) -> list[Part]:
    """The call's tensors in `count` parts along their first dimension, whose sizes differ by one row at most.

    The first tensor that has rows says how many there are; what has another number of them is in every part, whole.
    Raises PlanError if there are fewer rows than parts.
    """
    rows = next((tensor.shape[0] for tensor in tensors if tensor.dim()), 1)
    if count > rows:
        raise PlanError(
            f"{count} microbatches are more than the {rows} rows of the batch; say pipeline.microbatches={max(rows, 1)}"
        )
    parts: list[list[torch.Tensor]] = [[] for _ in range(count)]
    for tensor in tensors:
        has_rows = tensor.dim() > 0 and tensor.shape[0] == rows
        pieces = tensor.tensor_split(count) if has_rows else [tensor] * count
        for part, piece in zip(parts, pieces, strict=True):
            part.append(piece)
    sizes = [rows // count + (index < rows % count) for index in range(count)]
    return [Part(part, size, size / rows) for part, size in zip(parts, sizes, strict=True)]


def joined(values: Sequence[torch.Tensor], parts: Sequence[Part]) -> torch.Tensor:
    """What microbatches gave, as the batch would: rows end to end, of floating scalars the mean by rows.

    What has neither, the same for all rows, is that of the first.
    """
    first = values[0]
    if first.dim() == 0:
        if not first.is_floating_point():
            return first
        terms = [value * part.share for value, part in zip(values, parts, strict=True)]
        return functools.reduce(torch.add, terms)
    has_rows = all(value.dim() and value.shape[0] == part.rows for value, part in zip(values, parts, strict=True))
    return torch.cat(list(values)) if has_rows else first
