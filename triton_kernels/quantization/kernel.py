"""What kernels of this folder share: scales and rounding as in `reference`, bit for bit, and tiles of products."""

from typing import NamedTuple

import triton
import triton.language as tl


class ProductTile(NamedTuple):
    """What a program computes of a product of up to `most` rows: rows and outputs, from so many inputs at a time.

    stages: of inputs that are on their way from memory while a program computes.
    """

    most: float
    rows: int
    outputs: int
    inputs: int
    warps: int
    stages: int


@triton.jit
def magnitude(x):
    """|x|, infinite where x is not a number: a maximum would pass over that."""
    return tl.where(x == x, tl.abs(x), float("inf"))


@triton.jit
def scale_of(largest, limit):
    scale = tl.maximum(tl.div_rn(largest, limit), 1.1754943508222875e-38)  # 2^-126
    return tl.where(largest < float("inf"), scale, float("nan"))


@triton.jit
def ratio(x, scale, limit):
    """Bounded last, so that no multiply-add can make one rounding of this and what follows."""
    inverse = tl.div_rn(1.0, scale)
    return tl.minimum(tl.maximum(tl.where(scale == scale, x * inverse, 0.0), -limit), limit)


@triton.jit
def nearest(x):
    """The nearest integer, ties to even, of what is below 2^22: adding 1.5 * 2^23 leaves it in the last bits."""
    return (x + 12582912.0) - 12582912.0
