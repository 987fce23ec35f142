"""A call of a model -> its program, as functions: capture -> passes -> emit."""

from graphopt.lowering.call import Compilation, lower

__all__ = ["Compilation", "lower"]
