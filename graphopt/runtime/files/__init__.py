"""Tensors on disk: asynchronous direct I/O, and state that is updated as it streams by."""

from graphopt.runtime.files.memory import page_aligned
from graphopt.runtime.files.tensor_files import TensorFiles
from graphopt.runtime.files.transfer import Transfer

__all__ = ["TensorFiles", "Transfer", "page_aligned"]
