"""Products of groups of rows, each group with a matrix of its own, in operators of torch.

    grouped_mm      rows [t, k], matrices [e, k, n], ends [e] -> [t, n]
    grouped_outer   rows [t, k], others [t, n],      ends [e] -> [e, k, n]

Group i is the rows from ends[i - 1] up to ends[i], perhaps none; ends are int32 and do not decrease. Rows past the last
end are of no group: `grouped_mm` gives zeros there, and `grouped_outer` does not read them. Sums of half precision are
in float32 and rounded once.
"""

from collections.abc import Iterator

import torch
from torch import Tensor


def grouped_mm(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    result = rows.new_zeros(len(rows), matrices.shape[-1])
    for matrix, group in zip(matrices, _groups(ends), strict=True):
        torch.mm(rows[group], matrix, out=result[group])
    return result


def grouped_outer(rows: Tensor, others: Tensor, ends: Tensor) -> Tensor:
    result = rows.new_empty(len(ends), rows.shape[-1], others.shape[-1])
    for matrix, group in zip(result, _groups(ends), strict=True):
        torch.mm(rows[group].t(), others[group], out=matrix)
    return result


def _groups(ends: Tensor) -> Iterator[slice]:
    start = 0
    for end in ends.tolist():
        yield slice(start, end)
        start = end
