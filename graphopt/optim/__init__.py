"""Optimizers for parameters as graphopt keeps them."""

from graphopt.optim.adamw import AdamW

__all__ = ["AdamW"]
