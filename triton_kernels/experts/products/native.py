"""Products by group in native code of torch; functions have the arguments and results of those in `reference`."""

from torch import Tensor

from graphopt.triton_kernels.experts.products import reference, torchs


def grouped_mm(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    if not torchs.takes(rows, matrices):
        return reference.grouped_mm(rows, matrices, ends)
    result = torchs.product(rows, matrices, ends)
    result[int(ends[-1]) :] = 0
    return result


def grouped_outer(rows: Tensor, others: Tensor, ends: Tensor) -> Tensor:
    if not torchs.takes(rows, others):
        return reference.grouped_outer(rows, others, ends)
    return torchs.product(rows.t(), others, ends)
