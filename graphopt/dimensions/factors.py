"""The coarsest factors that make up two shapes of equally many elements, in the same order."""

import math
from itertools import count

import sympy  # type: ignore[import-untyped]

from graphopt._torch import symbolic_expression
from graphopt.dimensions.notation import Labels, Shape, is_one
from graphopt.dimensions.signature import Dimension, Dimensions
from graphopt.ir.values import in_example


def refined(before: Shape, after: Shape) -> tuple[Labels, Dimensions, Dimensions]:
    """Label two shapes by the factors they share; what they do not share cannot be split.

    ``[b, s, h*d]`` and ``[b, s, h, d]`` are ``b s (h d)`` and ``b s h d``. ``[4, 6]`` and ``[6, 4]`` share their
    outermost 2, and then differ.
    """
    labels = Labels()
    if any(isinstance(size, int) and size == 0 for size in (*before, *after)):
        return labels, tuple(map(labels.apart, before)), tuple(map(labels.apart, after))
    left, right = _Side(before), _Side(after)
    names = (f"x{index}" for index in count())
    while left.advance() and right.advance():
        shared = _common(left.rest, right.rest)
        if shared is not None:
            name = labels.name(next(names), shared)
            left.take(name, shared)
            right.take(name, shared)
        else:
            _skip(left, right, labels)
    return labels, left.named(), right.named()


class _Side:
    """One of the shapes. at: the dimension that is being taken apart; rest: what of it has no label yet."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.at = 0
        self.rest: int = shape[0] if shape else 1
        self.dimensions: list[list[str]] = [[] for _ in shape]

    def advance(self) -> bool:
        """Go on to the next factor that is not one; False at the end."""
        while self.at < len(self.shape) and is_one(self.rest):
            self.at += 1
            self.rest = self.shape[self.at] if self.at < len(self.shape) else 1
        return self.at < len(self.shape)

    def take(self, name: Dimension, size: int) -> None:
        self.dimensions[self.at].extend(name)
        quotient = _quotient(self.rest, size)
        assert quotient is not None
        self.rest = quotient

    def skip(self, labels: Labels) -> int:
        """Label what is left of this dimension as whole."""
        size = self.rest
        self.take(labels.apart(size), size)
        self.advance()
        return size

    def named(self) -> Dimensions:
        return tuple(map(tuple, self.dimensions))


def _skip(left: _Side, right: _Side, labels: Labels) -> None:
    """Go on to where both sides have seen equally many elements again."""
    seen, other = left.skip(labels), right.skip(labels)
    while left.at < len(left.shape) or right.at < len(right.shape):
        if _expression(seen - other) == 0:
            return
        behind = right.at == len(right.shape) or (left.at < len(left.shape) and in_example(seen) <= in_example(other))
        if behind:
            seen = seen * left.skip(labels)
        else:
            other = other * right.skip(labels)


def _common(one: int, other: int) -> int | None:
    """The factor that two sizes start with: one of them, or their greatest common divisor if both are known."""
    if isinstance(one, int) and isinstance(other, int):
        divisor = math.gcd(one, other)
        return divisor if divisor > 1 else None
    if _quotient(other, one) is not None:
        return one
    return other if _quotient(one, other) is not None else None


def _quotient(size: int, divisor: int) -> int | None:
    """`size` divided by `divisor`, if that is a whole number whatever the symbols stand for."""
    if isinstance(size, int) and isinstance(divisor, int):
        return size // divisor if size % divisor == 0 else None
    ratio = sympy.cancel(_expression(size) / _expression(divisor))
    if ratio.is_Integer:
        return int(ratio)
    return size // divisor if sympy.denom(ratio) == 1 else None


def _expression(size: int) -> sympy.Expr:
    return sympy.expand(sympy.Integer(size) if isinstance(size, int) else symbolic_expression(size))
