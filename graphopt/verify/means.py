"""What a reduced gradient must be: the mean over the ranks, taken once, of what this rank computed."""

from typing import Any

import torch

from graphopt.ir.layout import ParameterLayout
from graphopt.verify.value_numbers import Key, ValueNumbers

aten = torch.ops.aten


class NotTheMean(Exception):
    """A gradient is something else than the mean over ranks; the message says what."""


def local_gradient(values: ValueNumbers, number: int, layout: ParameterLayout) -> int:
    """The number of the gradient that a rank computes by itself, from that of the mean which it stores.

    The mean is, in this order: rows of the gradient, padded to equal parts; a sum over the layout's axis, scattered if
    the parameter is; sums over other axes; a division by the ranks; a cast to the stored dtype. Sums over other axes
    are part of what the rank computes: sums commute, and rows are summed each by itself. Raises NotTheMean.
    """
    key = values.key(number)
    if key[0] == "cast" and key[2] == layout.dtype:
        key = values.key(key[1])
    total = _divided(key, layout.ranks)
    key = values.key(total)
    others = []
    while key[:2] == ("sum", "all-reduce") and key[2] != layout.axis:
        others.append(key[2])
        key = values.key(key[3])
    kind = "all-reduce" if layout.is_whole else "reduce-scatter"
    if key[0] != "sum":
        raise NotTheMean(f"is not summed over {layout.axis}")
    if key[1] != kind:
        raise NotTheMean(f"is summed by {key[1]}, where its parameter needs {kind}")
    if key[2] != layout.axis:
        raise NotTheMean(f"is summed over {key[2]}, not over {layout.axis}")
    number = key[3]
    if not layout.is_whole:
        number = _unpadded(values, number, layout)
    if _is_sum(values, number, layout.axis):
        raise NotTheMean(f"is summed over {layout.axis} twice")
    for axis in reversed(others):
        number = values.number(("sum", "all-reduce", axis, number))
    return number


def _divided(key: Key, ranks: int) -> int:
    if key[0] is not aten.div.Tensor:
        raise NotTheMean(f"is not divided by the {ranks} ranks")
    (_, (_, numerator), divisor) = key[1]
    if divisor != (int, ranks):
        raise NotTheMean(f"is divided by {divisor[1]}, not by the {ranks} ranks")
    return int(numerator)


def _unpadded(values: ValueNumbers, number: int, layout: ParameterLayout) -> int:
    """The gradient in the shape of its parameter, from its rows padded to equal parts."""
    key = values.key(number)
    if layout.is_padded:
        missing = layout.gathered_shape[0] - layout.rows
        padding = [0, 0] * len(layout.row_shape) + [0, missing]
        wanted: tuple[Any, ...] = ("list", *((int, size) for size in padding))
        if key[0] is not aten.constant_pad_nd.default or len(key[1]) != 3 or key[1][2] != wanted:
            raise NotTheMean(f"is not padded by {missing} rows to equal parts")
        number = key[1][1][1]
        key = values.key(number)
    rows = (layout.rows, *layout.row_shape)
    return int(key[1]) if rows != layout.shape and key[:1] == ("reshape",) and key[2] == rows else number


def _is_sum(values: ValueNumbers, number: int, axis: str) -> bool:
    """Whether a value is a sum over `axis`, looking through what rescales or reshapes it, and sums over other axes."""
    key = values.key(number)
    while key[0] in ("cast", "reshape", "sum") or key[0] is aten.div.Tensor:
        if key[0] == "sum" and key[2] == axis:
            return True
        number = key[1][1][1] if key[0] is aten.div.Tensor else key[3] if key[0] == "sum" else key[1]
        key = values.key(number)
    return False
