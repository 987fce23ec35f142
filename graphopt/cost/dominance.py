"""Which of several sums of nonnegative terms can be the largest."""

from fractions import Fraction
from typing import Any

import numpy as np

Rows = np.ndarray[Any, np.dtype[np.float64]]
_ROUNDING = 1e-9


def undominated(rows: Rows) -> list[int]:
    """The indices of rows that are needed for the largest sum, largest first.

    rows: [sums, terms], how often a sum has each term; whole numbers below 2**53. A row is left out if another has at
    least as much of every term, or two others have when they are mixed: a layer between two others that lie as far
    from it in all terms is never the only one where the sum is largest.
    """
    kept: list[int] = []
    for index in np.argsort(-rows.sum(axis=1), kind="stable"):
        if not (rows[kept] >= rows[index]).all(axis=1).any():
            kept.append(int(index))
    for index in list(kept):
        others = [other for other in kept if other != index]
        if _is_below_a_mixture(rows[others] - rows[index]):
            kept = others
    return kept


def _is_below_a_mixture(above: Rows) -> bool:
    """Whether some two rows of `above`, mixed, are nowhere negative."""
    for first in range(len(above) - 1):
        rest = above[first + 1 :]
        slope = above[first] - rest
        with np.errstate(divide="ignore", invalid="ignore"):
            bound = -rest / slope
        least = np.where(slope > 0, bound, 0.0).max(axis=1, initial=0.0)
        most = np.where(slope < 0, bound, 1.0).min(axis=1, initial=1.0)
        possible = (least <= most + _ROUNDING) & ((slope != 0) | (rest >= 0)).all(axis=1)
        if any(_mix(above[first], rest[other]) for other in np.flatnonzero(possible)):
            return True
    return False


def _mix(one: Rows, other: Rows) -> bool:
    """The same for two rows, without rounding."""
    least, most = Fraction(0), Fraction(1)
    for a, b in zip(map(Fraction, one), map(Fraction, other), strict=True):
        if a > b:
            least = max(least, -b / (a - b))
        elif a < b:
            most = min(most, -b / (a - b))
        elif b < 0:
            return False
    return least <= most
