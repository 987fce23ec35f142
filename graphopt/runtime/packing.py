"""Several tensors as one, the way a collective moves them, and back."""

from collections.abc import Callable, Sequence

import torch

_COMBINE: dict[str, Callable[..., torch.Tensor]] = {"sum": torch.add, "max": torch.maximum}


def concatenated(tensors: Sequence[torch.Tensor], out: torch.Tensor | None = None) -> torch.Tensor:
    """All elements in one dimension, in `out` if given; without it no copy for one contiguous tensor."""
    if out is not None:
        return torch.cat([t.reshape(-1) for t in tensors], out=out)
    return tensors[0].reshape(-1) if len(tensors) == 1 else torch.cat([t.reshape(-1) for t in tensors])


def packed_by_rank(tensors: Sequence[torch.Tensor], ranks: int, out: torch.Tensor | None = None) -> torch.Tensor:
    """[ranks, elements]: row r holds slice r of each tensor, [ranks * rows, ...], side by side."""
    if out is not None:
        return torch.cat([t.reshape(ranks, -1) for t in tensors], dim=1, out=out)
    slices = [t.reshape(ranks, -1) for t in tensors]
    return slices[0] if len(slices) == 1 else torch.cat(slices, dim=1)


def gathered_from_ranks(
    parts: Sequence[torch.Tensor], shapes: Sequence[torch.Size], into: Sequence[torch.Tensor | None]
) -> list[torch.Tensor]:
    """Each tensor's slices end to end, [ranks * rows, ...]; parts: what each rank sent, in one dimension.

    into: where each result goes; None for a new tensor.
    """
    sizes = [shape.numel() for shape in shapes]
    results = []
    for slices, shape, target in zip(zip(*(p.split(sizes) for p in parts), strict=True), shapes, into, strict=True):
        if target is None:
            target = parts[0].new_empty(len(parts) * shape[0], *shape[1:])
        torch.cat(slices, out=target.view(-1))
        results.append(target)
    return results


def split_into(flat: torch.Tensor, shapes: Sequence[torch.Size]) -> list[torch.Tensor]:
    """Consecutive pieces of `flat` in the given shapes; views."""
    pieces = flat.split([shape.numel() for shape in shapes])
    return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]


def reduced_over_ranks(
    parts: Sequence[torch.Tensor], shapes: Sequence[torch.Size], reduction: str = "sum"
) -> list[torch.Tensor]:
    """The sums, or maxima, of what the ranks sent for each tensor; parts: that of each rank, in one dimension."""
    pieces = (split_into(part, shapes) for part in parts)
    return [_reduced_in_order(each, _COMBINE[reduction]) for each in zip(*pieces, strict=True)]


def _reduced_in_order(parts: Sequence[torch.Tensor], combine: Callable[..., torch.Tensor]) -> torch.Tensor:
    """A new tensor, made of the first to the last: the same parts give the same bits."""
    if len(parts) == 1:
        return parts[0].clone()
    total = combine(parts[0], parts[1])
    for part in parts[2:]:
        combine(total, part, out=total)
    return total
