"""What ranks have in common, imported once in the server that they are forked from."""

import gc

import graphopt  # noqa: F401
import tests.support.zoo  # noqa: F401

gc.collect()
gc.freeze()  # what stays is not looked through at each collection
