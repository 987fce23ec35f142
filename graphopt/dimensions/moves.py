"""Moves over an axis, as another axis sees them: they go dimension by dimension."""

from collections.abc import Mapping

import torch

from graphopt.dimensions.notation import Call, Labels, Rule, positions
from graphopt.dimensions.signature import Signature

_moves = torch.ops.graphopt


def same_place(call: Call) -> Signature | None:
    """Each element comes from those at the same place on other ranks."""
    return _along(call, ())


def along_dim(call: Call) -> Signature | None:
    """The dimension whose parts move is whole; the others are as they were."""
    return _along(call, (call["dim"],))


def along_both(call: Call) -> Signature | None:
    """Two dimensions, of which one is cut and the other joined, are whole."""
    return _along(call, (call["split_dim"], call["gather_dim"]))


def _along(call: Call, dims: tuple[int, ...]) -> Signature:
    labels = Labels()
    ((given,), (result,)) = call.operands, call.results

    def named(shape: tuple[int, ...], side: str) -> tuple[tuple[str, ...], ...]:
        return tuple(
            labels.name(f"{side}{place}", size, whole=True) if dim in dims else labels.name(place, size)
            for dim, (place, size) in enumerate(zip(positions(len(shape)), shape, strict=True))
        )

    linear = () if call.target is _moves.maximum.default else (frozenset({0}),)
    found = labels.signature([named(given, "given ")], [named(result, "made ")], linear=linear)
    assert found is not None
    return found


def by_rows(call: Call) -> Signature | None:
    """Rows go elsewhere, each as it was; which is for all rows, and where groups end, to say."""
    labels = Labels()
    places = positions(len(call.operands[0]) - 1)
    row = tuple(labels.name(place, size) for place, size in zip(places, call.operands[0][1:], strict=True))
    given, ends, made = (
        labels.name(name, shape[0], whole=True)
        for name, shape in zip(("given", "ends", "made"), (*call.operands, *call.results), strict=True)
    )
    return labels.signature([(given, *row), (ends,)], [(made, *row)], linear=[frozenset({0})])


RULES: Mapping[object, Rule] = {
    **dict.fromkeys((_moves.enter, _moves.leave, _moves.first, _moves.maximum), same_place),
    **dict.fromkeys((_moves.part, _moves.gather, _moves.scatter_sum, _moves.own_part), along_dim),
    **dict.fromkeys((_moves.fold, _moves.unfold), along_dim),
    _moves.all_to_all: along_both,
    **dict.fromkeys((_moves.dispatch, _moves.combine), by_rows),
}
