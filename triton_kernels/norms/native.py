"""Norms of rows by `graphopt.cuda_ext`; functions have the arguments and results of those in `reference`."""

import functools

from graphopt.cuda_ext import norms
from graphopt.triton_kernels.norms import reference

forward = functools.partial(reference.forward, functions=norms)
backward = functools.partial(reference.backward, functions=norms)
